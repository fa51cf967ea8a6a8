"""Speed of the expert paths on a GPU, against a dense network of equal work and the card's peak.

    python bench/gpu_experts.py --out bench/results/gpu_experts.json

Every case is first held to the float32 reference, output and gradients; one that misses it gets no
speed. Paths take turns, medians are compared, and the fraction is of a large product measured in
the same run. `--tiny` runs the whole script on small shapes, in Triton's interpreter if need be;
its times mean nothing.

Shapes: T tokens, K slots per token, E experts, F width of one expert, D model width.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from moesaic.ops.grouped import experts_grouped
from moesaic.ops.reference import experts_reference
from moesaic.ops.triton import experts_triton, why_not
from moesaic.ops.weights import ExpertWeights

DTYPE = torch.bfloat16
LEAVES = ("out", "h", "weights", "up", "down")
# Relative RMS errors that bfloat16 explains; the interpreter cuts off instead of rounding.
OUT_BOUND, GRADIENT_BOUND, INTERPRETER_SLACK = 6e-3, 1e-2, 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of gated experts.

    Attributes:
        on: Share of experts that a token uses where their number varies (then K = E); 0 for top-k.
    """

    name: str
    T: int
    D: int
    F: int
    E: int
    K: int
    on: float = 0.0

    def inputs(self, device: str, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, ExpertWeights]:
        """Draw inputs of order one, and ids like those of a balanced router."""
        torch.manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=DTYPE)

        scores_TE = torch.rand(num_tokens, self.E, device=device)
        if self.on:
            ids_TK = torch.arange(self.E, device=device).expand_as(scores_TE)
            ids_TK = torch.where(scores_TE < self.on, ids_TK, self.E)
        else:
            ids_TK = scores_TE.topk(self.K, dim=1).indices
        weights_TK = torch.rand(ids_TK.shape, device=device) + 0.1
        up = normal(self.E, 2 * self.F, self.D).mul_(self.D**-0.5)
        down = normal(self.E, self.D, self.F).mul_(self.F**-0.5)
        weights = ExpertWeights(up=up, down=down, activation="silu", gated=True)
        return normal(num_tokens, self.D), ids_TK, weights_TK, weights


# The first two are SonicMoE's, arXiv 2512.14080; the others are cut out of dense networks of 8192
# neurons, of which a token uses a quarter or a half.
CASES = [
    Case(name="coarse", T=32768, D=4096, F=1024, E=128, K=8),
    Case(name="fine", T=16384, D=4096, F=256, E=256, K=8),
    Case(name="cut-quarter", T=8192, D=2048, F=128, E=64, K=64, on=0.25),
    Case(name="cut-half", T=8192, D=2048, F=512, E=16, K=16, on=0.5),
    Case(name="decode", T=8, D=4096, F=256, E=256, K=8),
]
TINY = [
    Case(name="tiny", T=40, D=32, F=16, E=4, K=2),
    Case(name="tiny-variable", T=24, D=16, F=16, E=3, K=3, on=0.5),
]

ExpertPath = Callable[[Tensor, Tensor, Tensor, ExpertWeights], Tensor]


def pass_both_ways(path: ExpertPath, inputs: Sequence[Any], dout_TD: Tensor) -> list[Tensor]:
    """Give the output and the gradients of h, of the slot weights and of both matrices."""
    h_TD, ids_TK, weights_TK, weights = inputs
    leaves = [x.detach().requires_grad_() for x in (h_TD, weights_TK, weights.up, weights.down)]
    out_TD = path(leaves[0], ids_TK, leaves[1], weights._replace(up=leaves[2], down=leaves[3]))
    return [out_TD.detach(), *torch.autograd.grad(out_TD, leaves, dout_TD)]


def check(case: Case, device: str, num_tokens: int = 1024) -> dict[str, Any]:
    """Compare our path with the float32 reference on some of the tokens."""
    inputs = case.inputs(device, min(case.T, num_tokens))
    dout_TD = torch.randn_like(inputs[0])
    actual = pass_both_ways(experts_triton, inputs, dout_TD)
    h_TD, ids_TK, weights_TK, w = inputs
    wide = w._replace(up=w.up.float(), down=w.down.float())
    expected = pass_both_ways(
        experts_reference, (h_TD.float(), ids_TK, weights_TK, wide), dout_TD.float()
    )
    slack = 1 if device == "cuda" else INTERPRETER_SLACK
    errors, holds = {}, True
    for name, a, e in zip(LEAVES, actual, expected, strict=True):
        errors[name] = ((a.float() - e).norm() / e.norm()).item()
        # Written so that a NaN fails.
        holds &= errors[name] <= slack * (OUT_BOUND if name == "out" else GRADIENT_BOUND)
    return {"holds": holds, "relative_rms": errors}


def dense(case: Case, active: float, device: str) -> tuple[Tensor, Tensor]:
    """Make the matrices of a dense gated network that does the work of the active experts."""
    width = max(16, round(active * case.F / 16) * 16)
    up = torch.randn(2 * width, case.D, device=device, dtype=DTYPE).mul_(case.D**-0.5)
    down = torch.randn(case.D, width, device=device, dtype=DTYPE).mul_(width**-0.5)
    return up.requires_grad_(), down.requires_grad_()


def measure(case: Case, device: str, repeats: int) -> dict[str, Any]:
    """Time every path in turns, forward alone and both ways."""
    inputs = case.inputs(device, case.T)
    h_TD, ids_TK, *_ = inputs
    pairs = int((ids_TK < case.E).sum())
    dout_TD = torch.randn_like(h_TD)
    up, down = dense(case, pairs / case.T, device)

    def twin(h_TD: Tensor, *_: object) -> Tensor:
        gate, value = nnf.linear(h_TD, up).chunk(2, dim=-1)
        return nnf.linear(nnf.silu(gate) * value, down)

    def twin_both() -> None:
        h = h_TD.detach().requires_grad_()
        torch.autograd.grad(twin(h), [h, up, down], dout_TD)

    def forward(path: ExpertPath) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            path(*inputs)

        return run

    def both(path: ExpertPath) -> Callable[[], None]:
        def run() -> None:
            pass_both_ways(path, inputs, dout_TD)

        return run

    runs = {
        "triton": {"forward": forward(experts_triton), "both": both(experts_triton)},
        "grouped": {"forward": forward(experts_grouped), "both": both(experts_grouped)},
        "dense": {"forward": forward(twin), "both": twin_both},
    }
    # Two products forward, of two and one matrices of D by F; backward does each twice.
    flops = {"forward": 6 * pairs * case.D * case.F, "both": 18 * pairs * case.D * case.F}
    out: dict[str, Any] = {"pairs": pairs, "active_experts": pairs / case.T, "flops": flops}
    for direction in ("forward", "both"):
        out[direction] = interleave({n: r[direction] for n, r in runs.items()}, device, repeats)
    return out


def interleave(
    runs: dict[str, Callable[[], None]], device: str, repeats: int
) -> dict[str, dict[str, float | None]]:
    """Median seconds and peak bytes of each run; none where it does not fit in memory."""
    times_s: dict[str, list[float]] = {name: [] for name in runs}
    peak_bytes: dict[str, int | None] = dict.fromkeys(runs)
    for turn in range(repeats + 2):
        for name, run in list(runs.items()):
            try:
                seconds, peak = clock(run, device)
            except torch.OutOfMemoryError:
                del runs[name]
                times_s[name].clear()
                torch.cuda.empty_cache()
                continue
            # The first two turns compile and warm up.
            if turn >= 2:
                times_s[name].append(seconds)
                peak_bytes[name] = peak
    return {
        name: {
            "seconds": statistics.median(values) if values else None,
            "peak_bytes": peak_bytes[name],
        }
        for name, values in times_s.items()
    }


def clock(run: Callable[[], object], device: str) -> tuple[float, int | None]:
    """Time one run; on a GPU between two events, and with the memory it took at most."""
    if device != "cuda":
        start_s = time.perf_counter()
        run()
        return time.perf_counter() - start_s, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated()


def peak_flops(device: str, size: int) -> float:
    """Rate of the fastest of several large square products."""
    x, y = (torch.randn(size, size, device=device, dtype=DTYPE) for _ in range(2))
    return 2 * size**3 / min(clock(lambda: x @ y, device)[0] for _ in range(10))


def table(record: dict[str, Any]) -> str:
    """Lay the results out for reading."""
    m = record["machine"]
    lines = [
        f"{m['device']}, torch {m['torch']}, triton {m['triton']}, {record['date']}; "
        f"product of {record['peak_flops'] / 1e12:.4g} TFLOP/s, in {m['dtype']}",
        f"{'case':14} {'':8} {'path':8} {'ms':>9} {'TFLOP/s':>9} {'of peak':>8} {'of dense':>9}"
        f" {'peak GB':>8}",
    ]
    for case in record["cases"]:
        if not case["check"]["holds"]:
            lines.append(f"{case['name']:14} misses the reference: {case['check']['relative_rms']}")
            continue
        for direction in ("forward", "both"):
            twin_s = case[direction]["dense"]["seconds"]
            for name, result in case[direction].items():
                head = f"{case['name']:14} {direction:8} {name:8}"
                if result["seconds"] is None:
                    lines.append(f"{head} does not fit in memory")
                    continue
                rate = case["flops"][direction] / result["seconds"]
                speed = twin_s / result["seconds"] if twin_s else float("nan")
                peak = result["peak_bytes"]
                lines.append(
                    f"{head} {result['seconds'] * 1e3:9.3f} {rate / 1e12:9.4g} "
                    f"{rate / record['peak_flops']:8.1%} {speed:9.1%} "
                    + (f"{peak / 1e9:8.2f}" if peak is not None else f"{'-':>8}")
                )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script."""
    parser = argparse.ArgumentParser(description="Speed of the expert paths on a GPU.")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on any machine")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each path")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    cases = TINY if options.tiny else CASES
    if device == "cpu" and not options.tiny:
        parser.exit(2, "this needs a cuda device, and torch finds none; --tiny runs on a cpu\n")
    h_1D, _, _, weights = TINY[0].inputs(device, 1)
    if problem := why_not(h_1D, weights):
        parser.exit(2, problem + "\n")
    import triton

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu, Triton's interpreter"
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "device": name,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "dtype": str(DTYPE).removeprefix("torch."),
        },
        "tiny": options.tiny,
        "repeats": options.repeats,
        "peak_flops": peak_flops(device, 128 if options.tiny else 8192),
        "cases": [],
    }
    for case in cases:
        result = {**asdict(case), "check": check(case, device)}
        if result["check"]["holds"]:
            result.update(measure(case, device, options.repeats))
        record["cases"].append(result)
    print(table(record))
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main()
