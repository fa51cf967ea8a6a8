"""The machine a measurement was made on, what it can do, and the dtype that suits it."""

from __future__ import annotations

import functools
import logging
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

logger = logging.getLogger(__name__)

# One layer's product of a small model, for a prompt of 64 tokens.
_PROBE = (64, 1024, 1024)
_PROBE_SECONDS = 0.05
# Below this gain the lost digits of bfloat16 are not worth it.
_GAIN = 1.1


def machine_info(dtype: str = "float32", device: str = "cpu") -> dict[str, Any]:
    """Describe this machine, as the `machine` section of the evaluation record.

    Args:
        dtype: Of the models that were measured.
        device: Where they ran.
    """
    info = {
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "dtype": dtype,
    }
    if device.startswith("cuda"):
        info["gpu"] = torch.cuda.get_device_name(device)
    return info


def available_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def fastest_dtype(device: str = "cpu") -> str:
    """Find the dtype in which this device multiplies fastest, by trying for 0.1 s.

    bfloat16 is several times slower than float32 on a CPU without instructions for it, and faster
    with them, so it is measured rather than assumed. On CUDA it is bfloat16.

    Returns:
        `float32` or `bfloat16`; on a CPU the latter only where it wins by a tenth or more.
    """
    if device.startswith("cuda"):
        return "bfloat16"
    seconds = {name: _probe(getattr(torch, name)) for name in ("float32", "bfloat16")}
    fastest = "bfloat16" if _GAIN * seconds["bfloat16"] < seconds["float32"] else "float32"
    logger.info(
        "dtype %s: a product took %.2f ms in float32 and %.2f ms in bfloat16",
        fastest,
        1e3 * seconds["float32"],
        1e3 * seconds["bfloat16"],
    )
    return fastest


def flops_per_s(dtype: str = "float32") -> float:
    """FLOPs per second of one layer's product of a small model, by trying for 0.05 s."""
    num_rows, num_in, num_out = _PROBE
    return 2 * num_rows * num_in * num_out / _probe(getattr(torch, dtype))


def peak_bytes() -> int:
    """Largest memory of this process so far."""
    status = Path("/proc/self/status")
    # Linux hands the parent's ru_maxrss down to its children, so it is not asked there.
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _probe(dtype: torch.dtype) -> float:
    """Shortest time of one product, in seconds; at least two are made after a warm-up."""
    num_rows, num_in, num_out = _PROBE
    x = torch.ones(num_rows, num_in, dtype=dtype)
    weight = torch.ones(num_out, num_in, dtype=dtype)
    torch.nn.functional.linear(x, weight)
    times: list[float] = []
    end = time.perf_counter() + _PROBE_SECONDS
    while len(times) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - start)
    return min(times)


def source_commit() -> str:
    """Commit of the source tree this runs from, `-dirty` if it was changed; empty outside of it."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str | None:
        try:
            run = subprocess.run(
                ["git", "-C", str(here.parent), *words], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    # Installed inside somebody else's repository, its commit is not ours.
    if not git("ls-files", "--error-unmatch", str(here)):
        return ""
    return git("describe", "--always", "--dirty", "--abbrev=12") or ""
