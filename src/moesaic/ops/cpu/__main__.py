"""Compile the native code now, so that nothing waits for it later."""

from __future__ import annotations

import sys

from moesaic.ops.cpu import library


def main() -> None:
    """Compile, or say why not; without native code everything still runs, in plain torch."""
    reason = library.why_not()
    if reason:
        sys.stdout.write(f"{reason}; experts will run in plain torch\n")
        return
    library.library()
    sys.stdout.write("native kernels are ready\n")


if __name__ == "__main__":
    main()
