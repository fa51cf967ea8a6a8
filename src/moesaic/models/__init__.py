"""The bridge to transformers: find networks, swap them, load and save."""

from moesaic.models.checkpoint import (
    add_step,
    load,
    load_dense,
    load_tokenizer,
    new_manifest,
    save,
)
from moesaic.models.modeling import adopt, register

__all__ = [
    "add_step",
    "adopt",
    "load",
    "load_dense",
    "load_tokenizer",
    "new_manifest",
    "register",
    "save",
]
