"""Methods that behave badly, registered as a user's plug-in would be."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from moesaic._errors import InputError
from moesaic._registry import MethodInfo
from moesaic.compression._table import COMPRESSIONS
from moesaic.compression.pruning.flap import FLAP, prune_flap

NAMES = ("crashes", "killed", "picky", "slow-start", "thin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of all of them.

    Attributes:
        active: Requested fraction.
        flag: A file whose existence makes the method work.
    """

    active: float = 0.7
    flag: str = ""

    def collectors(self):
        return ("neurons",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picky(Settings):
    """Settings that know four blocks only."""

    def __post_init__(self):
        if self.active * 4 % 1:
            raise InputError(f"active must be a quarter or a multiple, got {self.active}; try 0.5")


def _flap(model, stats, config, **options):
    return prune_flap(model, stats, FLAP(active=config.active, multiple=1), **options)


def crashes(model, stats, config, **options):
    if not Path(config.flag).is_file():
        raise RuntimeError("two and two make five")
    return _flap(model, stats, config, **options)


def killed(model, stats, config, **options):
    print("this stands on no line of messages")
    os.kill(os.getpid(), signal.SIGKILL)


def picky(model, stats, config, **options):
    if config.active < 0.5:
        raise InputError(f"active must be at least 0.5, got {config.active}; raise it")
    return _flap(model, stats, config, **options)


def slow_start(model, stats, config, **options):
    # Until the test has seen it and ends it; then as long as nobody says go.
    while not Path(config.flag).is_file():
        time.sleep(0.01)
    return _flap(model, stats, config, **options)


def thin(model, stats, config, **options):
    """Leave an ordinary dense model, with the first neurons of each network."""
    width = round(config.active * model.config.intermediate_size)
    for layer in model.model.layers:
        mlp = layer.mlp
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight = torch.nn.Parameter(linear.weight[:width].clone())
        mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, :width].clone())
    model.config.intermediate_size = width
    return model.eval(), {}


for _name in NAMES:
    COMPRESSIONS.register(
        MethodInfo(
            name=_name,
            target=f"comparison_plugin:{_name.replace('-', '_')}",
            config=f"comparison_plugin:{'Picky' if _name == 'picky' else 'Settings'}",
            summary="For tests",
            paper="ours",
        )
    )
