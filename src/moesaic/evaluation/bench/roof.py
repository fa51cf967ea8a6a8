"""The physical limit: how fast this machine reads memory and multiplies, and what follows.

No sparse network can be faster than the reading of the blocks it touches, nor than the arithmetic
of the blocks it uses. Both rates are measured, since a virtual machine does not tell them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moesaic.evaluation.bench.timing import measure
from moesaic.models.checkpoint import dtype_of

# Far beyond the caches, those shared between virtual machines included (260 MB on some).
BUFFER_BYTES = 768 << 20
_MATRIX = 2048
_ROW = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """What the machine can do with the threads that torch has.

    Attributes:
        read_bytes_per_s: The best of a sum, a maximum and a matrix-vector product.
        copy_bytes_per_s: Bytes read and bytes written, of a copy.
        flops_per_s: Of a large matrix product, by dtype.
        threads: How many.
        buffer_bytes: What was read.
    """

    read_bytes_per_s: float
    copy_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    threads: int
    buffer_bytes: int

    def to_plain(self) -> dict[str, Any]:
        """The `roof` section of a benchmark."""
        return asdict(self)

    def peak(self, dtype: str) -> float:
        """FLOPs per second for weights of a dtype.

        Weights in bfloat16 can be widened on the way, so on a processor without instructions for
        them the peak of float32 is theirs too.
        """
        if dtype == "bfloat16":
            return max(self.flops_per_s[name] for name in ("bfloat16", "float32"))
        return self.flops_per_s[dtype]

    def seconds(self, num_bytes: float, flops: float, dtype: str) -> float:
        """Shortest time to read so many bytes of weights and do so many FLOPs with them."""
        return max(num_bytes / self.read_bytes_per_s, flops / self.peak(dtype))


def measure_roof(
    dtypes: Sequence[str],
    *,
    seconds: float = 2.0,
    buffer_bytes: int = BUFFER_BYTES,
    matrix: int = _MATRIX,
) -> Roof:
    """Measure the roof of this machine.

    Args:
        dtypes: Dtypes whose peak is wanted; float32 is added.
        seconds: Budget of each of the two parts.
        buffer_bytes: Size of what is read; a copy of it is made.
        matrix: Size of the square matrices multiplied.
    """
    names = sorted({*dtypes, "float32"})
    products: dict[str, Callable[[], object]] = {}
    for name in names:
        a = torch.randn(matrix, matrix).to(dtype_of(name))
        products[name] = _product(a, a.clone())
    peaks = measure(products, seconds=seconds, warmup=1, min_rounds=3)
    buffer = torch.ones(max(1, buffer_bytes // (4 * _ROW)), _ROW)
    target = torch.empty_like(buffer)
    vector = torch.ones(_ROW)
    moves: dict[str, Callable[[], object]] = {
        "sum": buffer.sum,
        "max": buffer.amax,
        "matrix-vector": lambda: buffer @ vector,
        "copy": lambda: target.copy_(buffer),
    }
    times = measure(moves, seconds=seconds, warmup=1, min_rounds=3)
    num_bytes = buffer.numel() * buffer.element_size()
    # The limit is what the machine can do, so the fast quartile of the best way counts.
    return Roof(
        read_bytes_per_s=max(num_bytes / times[name].low_s for name in moves if name != "copy"),
        copy_bytes_per_s=2 * num_bytes / times["copy"].low_s,
        flops_per_s={name: 2 * matrix**3 / peaks[name].low_s for name in names},
        threads=torch.get_num_threads(),
        buffer_bytes=num_bytes,
    )


def _product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], object]:
    return lambda: a @ b
