"""`moesaic serve` beside the engine in it: tokens per second and time to the first token.

Every answer is checked first: the server gives the texts that the engine gives one by one, alone
and all at once, or nothing is timed. Then the engine in this process, our server and vLLM's, each
of them with the model loaded, answer in turns.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from moesaic._errors import InputError, RunError
from moesaic._progress import SILENT, Progress
from moesaic.data import DataConfig, prepare
from moesaic.evaluation.bench.cell import document, require_memory, use_threads
from moesaic.evaluation.bench.serve.ways import Answer, Ids, InProcess, OverHttp, Way
from moesaic.evaluation.bench.servers import running
from moesaic.evaluation.bench.timing import Timing, measure
from moesaic.inference.decoder import Decoder
from moesaic.models.checkpoint import load_any, load_tokenizer, read_config
from moesaic.serving.model import name_of
from moesaic.serving.prompts import stop_ids
from moesaic.serving.vllm import process as vllm

IN_PROCESS, SERVER, VLLM = "moesaic in process", "moesaic serve", "vllm serve"
# What the servers call the model.
_NAME = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeBenchConfig:
    """What is measured.

    Attributes:
        models: Checkpoints of ours, or dense models; a table each.
        weights: How weights are stored; vLLM has no `int8`.
        requests: Requests at once, besides one alone.
        prompt_tokens: Length of a prompt.
        tokens: Tokens of an answer.
        data: The text that prompts are taken from.
        threads: Of every runtime; 0 leaves what torch has.
        seconds: Budget of the timing of a model; three rounds are made even beyond it.
    """

    models: tuple[str, ...] = ("mosaic",)
    weights: Literal["float32", "bfloat16", "int8"] = "float32"
    requests: int = 8
    prompt_tokens: int = 16
    tokens: int = 64
    data: DataConfig = field(default_factory=lambda: DataConfig(sources=("builtin:docs",)))
    threads: int = 0
    seconds: float = 120.0

    def __post_init__(self) -> None:
        if not self.models:
            raise InputError("models is empty; name a checkpoint")
        for name in ("prompt_tokens", "tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        if self.requests < 2:
            raise InputError(f"requests must be at least 2, got {self.requests}; 8 is usual")
        if self.prompt_tokens > self.data.block:
            raise InputError(
                f"prompt_tokens must be at most data.block={self.data.block}, whose beginnings "
                f"prompts are, got {self.prompt_tokens}"
            )
        if self.threads < 0 or self.seconds <= 0:
            raise InputError(
                "threads must be at least 0 and seconds above 0, got "
                f"{self.threads} and {self.seconds}"
            )

    @property
    def length(self) -> int:
        """Positions that a sequence takes."""
        return self.prompt_tokens + self.tokens

    def to_plain(self) -> dict[str, Any]:
        """The `config` section of the document."""
        return asdict(self)


def serve_bench_cost(config: ServeBenchConfig) -> dict[str, float]:
    """Estimate what a run takes: cells, seconds and bytes of memory."""
    from transformers import AutoModelForCausalLM

    numbers = []
    for source in config.models:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(read_config(source))
        numbers.append(sum(p.numel() for p in model.parameters()))
    # In this process and in two servers, packed beside what was read; and caches.
    needed = 2 * 3 * 4 * max(numbers) + 3e9
    seconds = len(config.models) * (config.seconds + 120.0)
    return {"cells": len(config.models), "seconds": seconds, "memory_bytes": needed}


def bench_serve(config: ServeBenchConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Measure a server beside the engine in it.

    Args:
        config: What is measured.
        progress: Told of the stages.

    Returns:
        The document: machine, commit, and for each model a row per way to ask it.

    Raises:
        InputError: If a model cannot be read, does not fit into memory or has no native decoder.
        RunError: If the server gives another text than the engine; nothing is reported then.
    """
    require_memory(serve_bench_cost(config)["memory_bytes"], " and ".join(config.models))
    use_threads(config.threads)
    cells = [_cell(source, config, progress or SILENT) for source in config.models]
    return document("serve", config, cells, dtype=config.weights)


def _cell(source: str, config: ServeBenchConfig, progress: Progress) -> dict[str, Any]:
    tokenizer = load_tokenizer(source)
    split = prepare(config.data, tokenizer, progress=progress)
    starts = split.heldout.ids_NS[:, : config.prompt_tokens].tolist()
    with tempfile.TemporaryDirectory() as name, ExitStack() as opened:
        folder = Path(name)
        ways: dict[str, Way] = {}
        skipped: dict[str, str] = {}
        with progress.stage("load", 3, "ways") as stage:
            directory = _directory(source, tokenizer, folder)
            ways[IN_PROCESS] = _engine(directory, tokenizer, config)
            prompts = full_prompts(ways[IN_PROCESS], starts, config.requests, config.tokens)
            stage.advance()
            ways[SERVER] = _our_server(directory, config, folder, opened)
            stage.advance()
            try:
                ways[VLLM] = _vllm_server(directory, config, folder, opened)
            except RunError as error:
                skipped[VLLM] = str(error)
            stage.advance()
        rows = rows_of(ways, prompts, config)
    rows += [{"way": way, "skipped": why} for way, why in skipped.items()]
    return {
        "model": name_of(source),
        "weights": config.weights,
        "requests": config.requests,
        "prompt_tokens": config.prompt_tokens,
        "tokens": config.tokens,
        "rows": rows,
    }


def _directory(source: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """A directory that every server reads."""
    if Path(source).is_dir():
        return Path(source)
    directory = folder / "model"
    load_any(source).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _engine(
    directory: Path, tokenizer: PreTrainedTokenizerBase, config: ServeBenchConfig
) -> InProcess:
    model = load_any(str(directory))
    stop = stop_ids(model, tokenizer)
    decoder = Decoder(
        model,
        weight_format=config.weights,
        length=config.length,
        slots=config.requests,
        release=True,
    )
    return InProcess(decoder, tokenizer, stop, config.tokens)


def _our_server(
    directory: Path, config: ServeBenchConfig, folder: Path, opened: ExitStack
) -> OverHttp:
    def command(port: int) -> list[str]:
        start = [sys.executable, "-m", "moesaic.cli.main", "serve", str(directory)]
        start += ["--port", str(port), "--name", _NAME, "--weights", config.weights]
        start += ["--length", str(config.length), "--slots", str(config.requests)]
        return [*start, "--max-tokens", str(config.tokens)]

    # No key of the environment's: it would have to be sent.
    own = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "MOESAIC_API_KEY": ""}
    return _over_http(command, folder / "moesaic.log", SERVER, own, config, opened)


def _vllm_server(
    directory: Path, config: ServeBenchConfig, folder: Path, opened: ExitStack
) -> OverHttp:
    """Start vLLM's server.

    Raises:
        RunError: If it is not there, or cannot serve this.
    """
    if why := vllm.why_not():
        raise RunError(why)
    if config.weights == "int8":
        raise RunError("it has no weights of int8 on a CPU")
    options = ["--max-num-seqs", str(config.requests), "--no-enable-prefix-caching"]

    def command(port: int) -> list[str]:
        return vllm.serve_command(
            directory,
            port,
            name=_NAME,
            dtype=config.weights,
            length=config.length,
            options=options,
        )

    own = vllm.environment(torch.get_num_threads())
    return _over_http(command, folder / "vllm.log", VLLM, own, config, opened)


def _over_http(
    command: Callable[[int], list[str]],
    log: Path,
    name: str,
    environment: Mapping[str, str],
    config: ServeBenchConfig,
    opened: ExitStack,
) -> OverHttp:
    server = opened.enter_context(running(command, log, name=name, environment=environment))
    way = OverHttp(server.address, _NAME, config.tokens)
    opened.callback(way.close)
    return way


def full_prompts(way: Way, starts: Ids, count: int, tokens: int) -> list[list[int]]:
    """Choose prompts whose answers are as long as they may be, so that all ways do equal work.

    Args:
        way: What answers.
        starts: Prompts to choose from, in order.
        count: How many are wanted.
        tokens: Tokens of an answer at most.

    Raises:
        InputError: If there are too few.
    """
    kept: list[list[int]] = []
    for at in range(0, len(starts), count):
        some = starts[at : at + count]
        pairs = zip(some, way.ask(some), strict=True)
        kept += [list(ids) for ids, answer in pairs if answer.num_tokens == tokens]
        if len(kept) >= count:
            return kept[:count]
    raise InputError(
        f"{count} prompts with answers of {tokens} tokens are needed, and of {len(starts)} "
        f"beginnings of held-out blocks {len(kept)} have one; lower requests or tokens, or raise "
        "data.heldout_tokens_per_domain"
    )


def rows_of(
    ways: Mapping[str, Way], prompts: Ids, config: ServeBenchConfig
) -> list[dict[str, Any]]:
    """Check ways to ask a model, then time them.

    Args:
        ways: By name, the engine in process among them.
        prompts: For all requests at once; the first is asked alone.
        config: What is measured.

    Raises:
        RunError: If one of ours gives another text than the engine does one by one.
    """
    want = [ways[IN_PROCESS].ask([ids])[0] for ids in prompts]
    same = {name: same_texts(way, prompts, want) for name, way in ways.items()}
    for name in (IN_PROCESS, SERVER):
        if same.get(name, 1.0) < 1.0:
            raise RunError(
                f"{name} gives other texts than the engine one by one for {1 - same[name]:.0%} of "
                "the answers; no speed is reported until it is right"
            )
    counts = {1: prompts[:1], config.requests: prompts}
    answers: dict[tuple[str, int], list[list[Answer]]] = {
        (name, count): [] for name in ways for count in counts
    }
    calls = {
        f"{name}|{count}": partial(_ask, ways[name], counts[count], kept)
        for (name, count), kept in answers.items()
    }
    times = measure(calls, seconds=config.seconds, warmup=1, min_rounds=3)
    speeds = {key: _speed(times["|".join(map(str, key))], kept) for key, kept in answers.items()}
    return [
        {
            "way": name,
            "same_as_engine": same[name],
            "requests": {
                str(count): {
                    **speeds[name, count],
                    "of_engine": speeds[name, count]["tokens_per_s"]
                    / speeds[IN_PROCESS, count]["tokens_per_s"],
                }
                for count in counts
            },
        }
        for name in ways
    ]


def _ask(way: Way, prompts: Ids, kept: list[list[Answer]]) -> None:
    kept.append(way.ask(prompts))


def same_texts(way: Way, prompts: Ids, want: Sequence[Answer]) -> float:
    """Ask for every prompt alone, then for all at once.

    Returns:
        The share of the answers that have the text and the number of tokens wanted.
    """
    found = [way.ask([ids])[0] for ids in prompts] + way.ask(prompts)
    pairs = zip(found, [*want, *want], strict=True)
    same = [one.text == other.text and one.num_tokens == other.num_tokens for one, other in pairs]
    return sum(same) / len(same)


def _speed(timing: Timing, answers: list[list[Answer]]) -> dict[str, float]:
    """Tokens per second, and when the first text came in the calls that were timed."""
    timed = answers[-timing.samples * timing.calls :]
    first_s = [answer.first_s for each in timed for answer in each]
    num_tokens = sum(answer.num_tokens for answer in timed[0])
    half, most = np.percentile(first_s, (50, 95)).tolist()
    return {
        "tokens_per_s": num_tokens / timing.median_s,
        "low": num_tokens / timing.high_s,
        "high": num_tokens / timing.low_s,
        "samples": timing.samples,
        "first_p50_s": half,
        "first_p95_s": most,
    }
