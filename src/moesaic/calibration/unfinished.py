"""What an unfinished piece of calibration has so far, in one file, to go on with after a kill."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moesaic._errors import CheckpointError
from moesaic._files import atomic_write

_DONE = "done"


def restore(store: Path | None) -> tuple[int, dict[str, Tensor]]:
    """Read what `keep` kept.

    Args:
        store: The file; it need not exist.

    Returns:
        How many steps are done, and the tensors after them; 0 and none if there is no file.

    Raises:
        CheckpointError: If the file is damaged.
    """
    if store is None or not store.exists():
        return 0, {}
    try:
        with safe_open(store, framework="pt") as file:
            names = file.keys()
            return int(file.metadata()[_DONE]), {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{store} cannot be read ({error}); delete {store.parent} and run it again"
        ) from error


def keep(store: Path | None, num_done: int, tensors: Mapping[str, Tensor]) -> None:
    """Keep the tensors after some steps, in the place of earlier ones.

    Args:
        store: The file; nothing is kept if none.
        num_done: Steps that are done.
        tensors: By name.
    """
    if store is None:
        return
    whole = {name: value.contiguous() for name, value in tensors.items()}
    with atomic_write(store) as temporary:
        save_file(whole, temporary, metadata={_DONE: str(num_done)})
