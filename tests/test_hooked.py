"""Hooks are on while a block lasts, also those of a generator, and gone however it ends."""

import pytest
import torch
from torch import nn

from moesaic._hooks import hooked


def test_hooks_last_as_long_as_the_block():
    seen = []
    layers = [nn.Identity() for _ in range(3)]
    x = torch.ones(1)

    def run():
        seen.clear()
        for layer in layers:
            layer(x)
        return len(seen)

    with (
        pytest.raises(ZeroDivisionError),
        hooked(layer.register_forward_hook(lambda *_: seen.append(1)) for layer in layers),
    ):
        assert run() == 3
        raise ZeroDivisionError
    assert run() == 0
