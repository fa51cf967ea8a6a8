"""What the bounds share: how much is kept, and pieces of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

from moesaic._errors import InputError

# Floats of the largest tensor of a chunk: 64 MB.
_MAX_FLOATS = 1 << 24


def chunks(num_tokens: int, floats_per_token: int) -> Iterator[slice]:
    """Cut tokens into pieces that a bounded number of floats is enough for."""
    step = max(1, _MAX_FLOATS // floats_per_token)
    return (slice(start, start + step) for start in range(0, num_tokens, step))


def check_fraction(active: float) -> None:
    """Refuse a fraction outside (0, 1]."""
    if not 0.0 < active <= 1.0:
        raise InputError(f"active must be in (0, 1], got {active}; 0.5 keeps half")


def count_kept(active: float, total: int, what: str) -> int:
    """The number that a fraction stands for, or a refusal."""
    if not 0.0 < active <= 1.0 or round(active * total) < 1:
        raise InputError(
            f"active must be in (0, 1] and keep at least 1 of {total} {what}, got {active}; the "
            f"least is {1 / total:.3g}"
        )
    return round(active * total)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
