"""How many equal experts an active fraction is; one that falls between two is refused."""

from __future__ import annotations

from moesaic._errors import InputError

# A fraction written with six digits, as messages print it, is met.
_ROUNDING = 1e-6


def whole_experts(active: float, num_experts: int, *, least: int = 1) -> int:
    """Count the experts that make up an active fraction of all.

    Args:
        active: Fraction that a token uses, in (0, 1].
        num_experts: Equal experts, shared ones included.
        least: Experts that a token uses at least.

    Returns:
        A number in [least, num_experts].

    Raises:
        InputError: If the fraction is out of range or no such number of experts; names the
            nearest that are.
    """
    if not 0.0 < active <= 1.0:
        raise InputError(f"active must be in (0, 1], got {active}; 0.75 keeps 75%")
    count = round(active * num_experts)
    if count >= least and abs(active - count / num_experts) <= _ROUNDING:
        return count
    below = int(active * num_experts)
    near = sorted({min(max(number, least), num_experts) for number in (below, below + 1)})
    at_least = f", at least {least}" if least > 1 else ""
    raise InputError(
        f"active must be a whole number of {num_experts} experts{at_least}, got {active}; the "
        f"nearest that work: {' and '.join(f'{number / num_experts:.6g}' for number in near)}"
    )
