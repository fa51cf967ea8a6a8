"""The physical limit: how fast this machine reads memory and multiplies, and what follows.

No sparse network can be faster than the reading of the blocks it touches, nor than the arithmetic
of the blocks it uses. Both rates are measured, since a virtual machine does not tell them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from moesaic.evaluation.bench.timing import measure
from moesaic.models.checkpoint import dtype_of
from moesaic.ops.huge_pages import in_huge_pages

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


class Probe(NamedTuple):
    """A call that does nothing but read memory or multiply, and how often a cell would need it."""

    call: Callable[[], object]
    times: float


class Limits:
    """The physical limits of this machine: measured once, and ready to be timed beside a cell.

    A shared machine is fast in one minute and slow in the next, so a ratio to the limit needs the
    limit of that minute: every cell times what it must read or multiply, in turn with its methods.

    Args:
        dtypes: Dtypes whose peak is wanted; float32 is added.
        seconds: Budget of each of the two parts of the first measurement.
        buffer_bytes: Size of what is read; held as long as this is.

    Attributes:
        roof: The first measurement.
    """

    def __init__(
        self, dtypes: Sequence[str], *, seconds: float = 2.0, buffer_bytes: int = BUFFER_BYTES
    ) -> None:
        names = sorted({*dtypes, "float32"})
        self._matrices = {name: _matrix().to(dtype_of(name)) for name in names}
        products = {name: _product(a, a.clone()) for name, a in self._matrices.items()}
        peaks = measure(products, seconds=seconds, warmup=1, min_rounds=3)
        rows = max(1, buffer_bytes // (4 * _ROW))
        # As the packed weights lie.
        self._buffer = in_huge_pages(torch.ones(1, 1).expand(rows, _ROW))
        self._next_row = 0
        times = measure(self._moves(), seconds=seconds, warmup=1, min_rounds=3)
        num_bytes = self._buffer.nbytes
        reads = {name: time.low_s for name, time in times.items() if name != "copy"}
        self._read = _READS[min(reads, key=reads.__getitem__)]
        # The limit is what the machine can do, so the fast quartile of the best way counts.
        self.roof = Roof(
            read_bytes_per_s=num_bytes / min(reads.values()),
            copy_bytes_per_s=2 * num_bytes / times["copy"].low_s,
            flops_per_s={name: 2 * _MATRIX**3 / peaks[name].low_s for name in names},
            threads=torch.get_num_threads(),
            buffer_bytes=num_bytes,
        )

    def _moves(self) -> dict[str, Callable[[], object]]:
        target = torch.empty_like(self._buffer)
        moves: dict[str, Callable[[], object]] = {
            name: partial(read, self._buffer) for name, read in _READS.items()
        }
        return moves | {"copy": lambda: target.copy_(self._buffer)}

    def probes(self, num_bytes: float, flops: float, dtype: str) -> dict[str, Probe]:
        """What to time beside a cell: the slower of its times is the limit.

        Args:
            num_bytes: That the cell must read.
            flops: That it must do.
            dtype: Of its weights.
        """
        rows = max(1, min(len(self._buffer), math.ceil(num_bytes / (4 * _ROW))))
        probes = {"reading": Probe(partial(self._read_rows, rows), num_bytes / (4 * _ROW * rows))}
        peak = self.roof.peak(dtype)
        # A product that could not be the limit would only take time.
        if flops / peak >= 0.5 * num_bytes / self.roof.read_bytes_per_s:
            name = max(self._matrices, key=self.roof.flops_per_s.__getitem__)
            matrix = self._matrices[name if self.roof.peak(name) == peak else dtype]
            some = matrix[: max(1, _MATRIX // 4)]
            times = flops / (2 * some.numel() * _MATRIX)
            probes["arithmetic"] = Probe(_product(some, matrix), times)
        return probes

    def _read_rows(self, rows: int) -> object:
        """Read rows that were not read lately."""
        if self._next_row + rows > len(self._buffer):
            self._next_row = 0
        part = self._buffer[self._next_row : self._next_row + rows]
        self._next_row += rows
        return self._read(part)


_READS: dict[str, Callable[[torch.Tensor], object]] = {
    "sum": torch.sum,
    "max": torch.amax,
    "matrix-vector": lambda rows: rows @ rows.new_ones(_ROW),
}


def _matrix() -> torch.Tensor:
    return torch.randn(_MATRIX, _MATRIX)


def _product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], object]:
    return lambda: a @ b
