"""Time and memory of making a mosaic or a pruned model, from the command to the checkpoint.

    python bench/conversions.py --out bench/results/conversions-smollm2.json

Runs `moesaic convert` or `moesaic compress` as a user would, for every method of a protocol of
`moesaic compare`, one after the other: the model is loaded, the text read, calibrated on and the
checkpoint written. Nothing is trained. Entries of methods that are not asked for stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moesaic._files import read_json, write_json
from moesaic.evaluation.machine import machine_info, source_commit
from moesaic.recipes.comparison.protocol import Method, Protocol, read_protocol


def command(protocol: Protocol, method: Method, active: float, output: Path) -> list[str]:
    """The words that a user would type after `moesaic`."""
    options = {**method.options, "active": active}
    words = [method.kind, protocol.model, str(output), "--method", method.method]
    words += ["--dtype", protocol.dtype, "--calibration.tokens", str(protocol.calibration.tokens)]
    words += ["--data.block", str(protocol.data.block), "--data.sources", *protocol.data.sources]
    return [*words, "--set", *(f"{name}={json.dumps(value)}" for name, value in options.items())]


def measure(words: Sequence[str]) -> dict[str, Any]:
    """Run one command in a process of its own; its seconds and the most memory that it held.

    Raises:
        CalledProcessError: If it fails; what it printed is shown.
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "moesaic.cli.main", *words])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        # Linux counts in KiB.
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def measure_all(protocol: Protocol, active: float, names: Iterable[str], out: Path) -> None:
    """Measure methods and keep each as soon as it is known."""
    for name in names:
        method = protocol.methods[name]
        with tempfile.TemporaryDirectory() as directory:
            words = command(protocol, method, active, Path(directory) / "made")
            print("moesaic", *words, flush=True)
            entry = measure(words)
        entry = {
            "method": name,
            "active": active,
            "options": dict(method.options),
            **entry,
            "machine": machine_info(protocol.dtype),
            "commit": source_commit(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        print(f"{name}: {entry['seconds']:.0f} s, {entry['peak_bytes'] / 1e9:.2f} GB", flush=True)
        kept = read_json(out)["rows"] if out.is_file() else []
        rows = [row for row in kept if row["method"] != name] + [entry]
        rows.sort(key=lambda row: row["method"])
        write_json(out, {"model": protocol.model, "rows": rows})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--protocol", type=Path, default=Path(__file__).parent / "quality.yaml")
    parser.add_argument("--active", type=float, default=0.5, help="of the FFN weights")
    parser.add_argument("--only", nargs="+", default=(), help="names in the protocol; all if none")
    parser.add_argument("--out", type=Path, required=True, help="JSON; entries are replaced there")
    given = parser.parse_args(argv)
    protocol = read_protocol(given.protocol)
    methods = [name for name, method in protocol.methods.items() if method.kind != "bound"]
    if unknown := [name for name in given.only if name not in methods]:
        parser.error(f"--only names {unknown[0]!r}, which is none of {', '.join(methods)}")
    measure_all(protocol, given.active, given.only or methods, given.out)


if __name__ == "__main__":
    main()
