"""Compile the native code now, so that nothing waits for it later."""

from __future__ import annotations

from moesaic.ops.cpu import library


def main() -> None:
    """Compile, or say why not; without native code everything still runs, in plain torch."""
    reason = library.why_not()
    if reason:
        print(f"{reason}; experts will run in plain torch")
        return
    library.library()
    print("native kernels are ready")


if __name__ == "__main__":
    main()
