"""Hooks are on while a block lasts, also those of a generator, and gone however it ends."""

import contextlib

import torch
from torch import nn

from moesaic._hooks import hooked


def test_hooks_last_as_long_as_the_block():
    seen = []
    layers = nn.Sequential(*(nn.Identity() for _ in range(3)))
    on = (layer.register_forward_hook(lambda *_: seen.append(1)) for layer in layers)
    with contextlib.suppress(ZeroDivisionError), hooked(on):
        layers(torch.ones(1))
        assert len(seen) == 3
        raise ZeroDivisionError
    layers(torch.ones(1))
    assert len(seen) == 3
