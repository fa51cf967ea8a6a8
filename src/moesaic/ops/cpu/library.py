"""Compile the native code for this machine, once, and load it.

The code is a few header files without dependencies, so compiling them where they run takes seconds
and needs no wheel per machine. What it may use (AVX-512, with products of bfloat16 or without, or
AVX2) is what torch detected; a cache shared by several machines therefore keeps one library for
each kind. It runs on as many OpenMP threads as torch, those of torch itself where torch brings the
plain GNU library.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from moesaic._errors import RunError
from moesaic.ops.cpu.structs import SIGNATURES

logger = logging.getLogger(__name__)

_HERE = Path(__file__).resolve().parent
_SOURCES = (
    "kernels.cpp",
    *("decoder.h", "ffn.h", "routing.h", "experts.h", "activations.h", "panels.h"),
)
_FLAGS = (
    *("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC"),
    # See `fused` in panels.h.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
# What is used beyond torch's name of the processor's level, and the flags of each level.
_LEVELS = {
    "AVX512-BF16": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mavx512bf16"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}


def why_not() -> str:
    """Why this machine cannot run the native code, in one clause; empty when it can."""
    level = _level()
    if platform.system() != "Linux" or level not in _LEVELS:
        return (
            f"native kernels need Linux on x86 with AVX2, and this is {platform.machine()} {level}"
        )
    if not (_HERE / _SOURCES[0]).is_file():
        return "native kernels are not part of the code beside a checkpoint; install moesaic"
    if shutil.which(_compiler()[0]) is None and not _path(level).is_file():
        return f"native kernels need the compiler {_compiler()[0]}; install g++ or set CXX"
    return ""


def state() -> str:
    """What the native code is on this machine, in a few words."""
    level = _level()
    if reason := why_not():
        return f"none: {reason}"
    if _path(level).is_file():
        return f"compiled for {level}"
    return f"{level}; compiled at first use, in about 15 s"


@functools.cache
def library() -> ctypes.CDLL:
    """Load the native code, compiling it when the cache has none for this machine.

    Raises:
        RunError: If it cannot run here, or the compiler fails; says why.
    """
    reason = why_not()
    if reason:
        raise RunError(f"{reason}; without them experts run in plain torch")
    level = _level()
    path = _path(level)
    if not path.is_file():
        try:
            _compile(path, level)
        except OSError as error:
            raise RunError(
                f"the CPU kernels cannot be written to {path.parent} ({error.strerror}); set "
                "XDG_CACHE_HOME to a directory that can"
            ) from error
    loaded = ctypes.CDLL(str(path))
    loaded.moesaic_lanes.argtypes = []
    loaded.moesaic_has_dot.argtypes = []
    loaded.moesaic_threads.argtypes = [ctypes.c_int]
    for name, arguments in SIGNATURES.items():
        getattr(loaded, name).argtypes = arguments
    return loaded


def call(name: str, *arguments: object) -> None:
    """Call a native function.

    Raises:
        MemoryError: If it ran out of memory.
    """
    native = library()
    native.moesaic_threads(torch.get_num_threads())
    if getattr(native, name)(*arguments):
        raise out_of_memory(name)


def out_of_memory(name: str) -> MemoryError:
    """What is raised where a native function says so."""
    return MemoryError(f"{name} ran out of memory; use fewer tokens at a time")


def _level() -> str:
    level = str(torch.backends.cpu.get_cpu_capability())
    if level == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        return "AVX512-BF16"
    return level


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def _path(level: str) -> Path:
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((_HERE / name).read_bytes())
    digest.update(" ".join((*_compiler(), *_FLAGS, *_LEVELS[level])).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "moesaic" / f"kernels-{level.lower()}-{digest.hexdigest()[:16]}.so"


def _compile(path: Path, level: str) -> None:
    logger.info("compiling the CPU kernels for %s, once, in about 15 seconds", level)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        out = Path(scratch) / path.name
        sources = [str(_HERE / "kernels.cpp"), "-o", str(out)]
        command = [*_compiler(), *_FLAGS, *_LEVELS[level], *sources]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise RunError(
                f"{command[0]} could not compile the CPU kernels: {last[0]}; set CXX to a g++ of "
                "version 11 or newer"
            )
        out.replace(path)
