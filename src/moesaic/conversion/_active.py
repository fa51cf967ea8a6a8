"""A requested active fraction as a number of blocks."""

from __future__ import annotations

from moesaic._errors import InputError


def routed_blocks(active: float, num_blocks: int, num_shared: int = 0) -> int:
    """Say how many routed blocks a token must use so that exactly a fraction of all is active.

    Args:
        active: Fraction of the network's weights, in (0, 1].
        num_blocks: Equal blocks of the network, shared ones included.
        num_shared: Blocks that are always on.

    Returns:
        The number, at least 1.

    Raises:
        InputError: If no number gives that fraction; names the nearest fractions that work.
    """
    if not 0.0 < active <= 1.0:
        raise InputError(f"active must be in (0, 1], got {active}; 0.5 keeps half")
    if num_blocks < 1:
        raise InputError(f"experts must be at least 1, got {num_blocks}; 8 is usual")
    if not 0 <= num_shared < num_blocks:
        raise InputError(
            f"shared must be in [0, experts), got shared={num_shared} and experts={num_blocks}; "
            "leave some to the router"
        )
    for k in range(1, num_blocks - num_shared + 1):
        if abs((num_shared + k) / num_blocks - active) < 1e-6:
            return k
    works = [(num_shared + k) / num_blocks for k in range(1, num_blocks - num_shared + 1)]
    nearest = sorted(sorted(works, key=lambda fraction: abs(fraction - active))[:2])
    of_these = f", {num_shared} of them shared" if num_shared else ""
    raise InputError(
        f"active={active} is no number of blocks out of {num_blocks}{of_these}; the nearest that "
        f"works is {' or '.join(f'{fraction:.6g}' for fraction in nearest)}"
    )
