"""How many equal experts an active fraction is; one that falls between two is refused."""

from __future__ import annotations

from moesaic._errors import InputError

# A fraction written with six digits, as messages print it, is met.
_ROUNDING = 1e-6


def whole_experts(active: float, num_experts: int) -> int:
    """Count the experts that make up an active fraction of all.

    Args:
        active: Fraction that a token uses, in (0, 1].
        num_experts: Equal experts, shared ones included.

    Returns:
        A number in [1, num_experts].

    Raises:
        InputError: If the fraction is out of range or no whole number of experts; names the
            nearest that are.
    """
    if not 0.0 < active <= 1.0:
        raise InputError(f"active must be in (0, 1], got {active}; 0.75 keeps 75%")
    count = round(active * num_experts)
    if count >= 1 and abs(active - count / num_experts) <= _ROUNDING:
        return count
    below = int(active * num_experts)
    nearest = " and ".join(
        f"{count / num_experts:.6g}" for count in (below, below + 1) if 1 <= count <= num_experts
    )
    raise InputError(
        f"active must be a whole number of {num_experts} experts, got {active}; the nearest that "
        f"work: {nearest}"
    )
