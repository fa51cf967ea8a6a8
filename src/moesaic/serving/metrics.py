"""What Prometheus sees: requests, tokens, the line, latencies, and the experts of every layer.

Shapes: T tokens, L layers, E experts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moesaic.inference.activity import ActiveShare
from moesaic.inference.batching import Step
from moesaic.serving.worker import Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/models"),
    *("/health", "/ready", "/metrics"),
)
# Upper ends of the bins of a layer's histogram at most.
_BINS = 16


class ActiveExperts:
    """Counts how many experts tokens use, layer by layer; a collector of Prometheus.

    A histogram of the client library takes one call for each token and layer, which is longer than
    a layer of a small model takes; here a step is counted at once.

    Args:
        routed: The experts of every layer with a router, by the number of the layer.
    """

    def __init__(self, routed: Mapping[int, int]) -> None:
        self._counts = {i: np.zeros(experts + 1, np.int64) for i, experts in routed.items()}
        self._lock = threading.Lock()

    def observe(self, step: Step) -> None:
        """Count the tokens of a step."""
        if step.used_LTE is None:
            return
        count_LT = step.used_LTE.sum(2).numpy()
        with self._lock:
            for i, counts in self._counts.items():
                counts += np.bincount(count_LT[i], minlength=len(counts))

    def collect(self) -> Iterator[Metric]:
        """Give one histogram with a label for the layer."""
        family = HistogramMetricFamily(
            "moesaic_active_experts", "Experts that a token used in a layer", labels=["layer"]
        )
        with self._lock:
            counts_by_layer = {i: counts.copy() for i, counts in self._counts.items()}
        for i, counts in counts_by_layer.items():
            ends = np.unique(np.linspace(0, len(counts) - 1, _BINS + 1).round().astype(int))
            at_most = counts.cumsum()
            buckets = [(f"{end}.0", float(at_most[end])) for end in ends]
            buckets.append(("+Inf", float(at_most[-1])))
            total = float((counts * np.arange(len(counts))).sum())
            family.add_metric([str(i)], buckets, total)
        yield family


class Counting:
    """Counts every answer, refusals included.

    Args:
        app: What comes next.
        requests: Labelled by path and status.
    """

    def __init__(self, app: ASGIApp, *, requests: Counter) -> None:
        self._app = app
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Only paths that exist, so that nobody can make the table grow.
        path = scope["path"] if scope["path"] in _PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)


class Metrics:
    """All metrics of one server, in a registry of its own.

    Args:
        share: Of the model.
    """

    def __init__(self, share: ActiveShare) -> None:
        self.registry = CollectorRegistry()
        self._share = share
        self._experts = ActiveExperts(share.routed)
        if share.routed:
            self.registry.register(self._experts)
        options: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "moesaic_requests", "Requests answered", ["path", "status"], **options
        )
        self.request_s = Histogram(
            "moesaic_request_seconds", "From request to answer", buckets=_SECONDS, **options
        )
        self.first_token_s = Histogram(
            "moesaic_first_token_seconds",
            "From request to its first token",
            buckets=_SECONDS,
            **options,
        )
        self.disconnects = Counter(
            "moesaic_disconnects", "Requests whose client left before the end", **options
        )
        self._steps = Counter("moesaic_steps", "Steps of the batch", **options)
        self._prompt_tokens = Counter("moesaic_prompt_tokens", "Prompt tokens read", **options)
        self._new_tokens = Counter("moesaic_new_tokens", "Tokens written", **options)
        self._active = Counter(
            "moesaic_active_ffn_sum",
            "Sum over tokens of the fraction of the feed-forward networks that they used",
            **options,
        )
        self._tokens = Counter("moesaic_tokens", "Tokens that went through the model", **options)
        self._running = Gauge("moesaic_running_sequences", "Sequences being written", **options)
        self._waiting = Gauge("moesaic_waiting_sequences", "Sequences in line", **options)

    def watch(self, worker: Worker) -> None:
        """Read the line's length from a worker whenever it is asked for."""
        self._running.set_function(lambda: worker.batch.num_running)
        self._waiting.set_function(lambda: worker.num_present - worker.batch.num_running)

    def observe(self, step: Step) -> None:
        """Take in a step, on the worker's thread."""
        self._steps.inc()
        self._tokens.inc(len(step.keys))
        self._prompt_tokens.inc(step.prompt_rows)
        self._new_tokens.inc(sum(written.token is not None for written in step.written))
        if step.used_LTE is not None:
            self._active.inc(float(self._share.of(step.used_LTE).sum()))
            self._experts.observe(step)
