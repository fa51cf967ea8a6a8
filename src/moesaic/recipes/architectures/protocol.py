"""The protocol for architectures as data: what all have in common, and each in a few lines.

Every architecture is trained from scratch as the networks of the same decoder, on the same tokens,
and costs the same counted FLOPs per token as its dense networks of `model.width`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moesaic._config import build_config, to_plain
from moesaic._errors import InputError
from moesaic.data import DataConfig
from moesaic.models.mixture import MixtureConfig
from moesaic.nn.layer import LayerConfig
from moesaic.nn.routers._table import ROUTERS
from moesaic.recipes.comparison.protocol import (
    OWN_TRAINING,
    HeldOut,
    check_name,
    check_seeds,
    import_plugin,
)
from moesaic.recipes.recipe import read_values
from moesaic.training.config import TrainConfig

KIND = "architectures"
# What the protocol decides, and by what.
_NOT_MODEL = {
    "vocab_size": "tokenizer",
    "positions": "data.block",
    "layers": "architectures",
    "losses": "architectures",
}
_NOT_TRAIN = {
    "active": "architectures",
    "distill": "the protocol, which has no teacher",
    "match": "the protocol, which has no teacher",
    "language": "the protocol, which trains on the text alone",
    "trains": "the protocol, which trains everything",
    "seed": "seeds",
}
_NOT_LAYER = {
    "num_experts": "experts",
    "width": "model.width, at equal FLOPs",
    "shared_width": "shared",
    "router": "router",
    "router_options": "options",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What stands in the place of the networks.

    Attributes:
        experts: Routed experts of a layer; 0 is a dense network.
        shared: Experts of the same width that are always on.
        router: Registered name.
        options: Its settings.
        first_options: Settings that differ in the first layer.
        active: Routed experts that a token is meant to use on average, which the width is computed
            from. None where the router always uses as many.
        hold: Whether training holds `active` by the weight of the sparsity loss and settles the
            threshold on it; for sigmoid gates.
        losses: By registered name, settings and `coef`.
        layer: Other settings of a layer, such as `experts` for another kind of experts.
        train: Settings of the training that are its own.
    """

    experts: int = 0
    shared: int = 0
    router: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    first_options: Mapping[str, Any] = field(default_factory=dict)
    active: float | None = None
    hold: bool = False
    losses: Mapping[str, Any] = field(default_factory=dict)
    layer: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.experts, self.shared) < 0:
            raise InputError(
                f"experts and shared must be at least 0, got {self.experts} and {self.shared}"
            )
        if bool(self.experts) != bool(self.router):
            raise InputError(
                f"experts and router go together, got {self.experts} and {self.router!r}; a dense "
                "network has neither"
            )
        if self.active is not None and not 0 < self.active <= self.experts:
            raise InputError(
                f"active must be in (0, experts={self.experts}], got {self.active:g}; it counts "
                "the routed experts of a token"
            )
        if self.hold and (
            self.router != "sigmoid-threshold"
            or self.active is None
            or "sparsity" not in self.losses
        ):
            raise InputError(
                "hold needs the router sigmoid-threshold, active and the loss sparsity, whose "
                "weight it moves; add them or leave it out"
            )

    @property
    def abilities(self) -> frozenset[str]:
        """Those of its router."""
        return ROUTERS[self.router].abilities if self.router else frozenset()

    @property
    def sees_batch(self) -> bool:
        """Whether a token's routing depends on others, later ones too, when it is measured."""
        return "sees-batch" in self.abilities

    def layer_config(self, index: int, width: int) -> LayerConfig:
        """The layer at a place.

        Args:
            index: Of the decoder layer.
            width: Neurons of one expert, or of the dense network.
        """
        if not self.experts:
            return LayerConfig(num_experts=0, shared_width=width, **self.layer)
        first = self.first_options if index == 0 else {}
        return LayerConfig(
            num_experts=self.experts,
            width=width,
            shared_width=self.shared * width,
            router=self.router,
            router_options={**self.options, **first},
            **self.layer,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """A protocol as it is written."""

    kind: Literal["architectures"]
    architectures: Any
    model: Any = None
    tokenizer: str = "bytes"
    data: DataConfig = field(default_factory=lambda: DataConfig(block=128))
    heldout: HeldOut = field(default_factory=HeldOut)
    train: Any = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seeds: tuple[int, ...] = (0, 1, 2)
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureProtocol:
    """Everything that a comparison of architectures needs.

    Attributes:
        model: The decoder with dense networks, whose FLOPs are everybody's; `width` is theirs.
        tokenizer: `bytes`, or where a tokenizer of transformers is.
        data: The text.
        heldout: What is measured.
        train: The training, the same for every architecture.
        device: Where it is done; `auto` takes a GPU if there is one.
        seeds: Of the first weights and of the order of the text.
        plugins: Python modules that register parts, imported first.
        architectures: By name.
    """

    model: MixtureConfig
    tokenizer: str
    data: DataConfig
    heldout: HeldOut
    train: TrainConfig
    device: str
    seeds: tuple[int, ...]
    plugins: tuple[str, ...]
    architectures: Mapping[str, Architecture]

    def common(self) -> dict[str, Any]:
        """What decides every result: a directory of results has one of these."""
        return {
            "kind": KIND,
            "model": _without(self.model, _NOT_MODEL),
            "tokenizer": self.tokenizer,
            "data": to_plain(self.data),
            "heldout": to_plain(self.heldout),
        }

    def plain(self) -> dict[str, Any]:
        """The protocol as data, every setting spelt out."""
        return {
            **self.common(),
            "train": _without(self.train, _NOT_TRAIN),
            "device": self.device,
            "seeds": list(self.seeds),
            "plugins": list(self.plugins),
            "architectures": {name: to_plain(one) for name, one in self.architectures.items()},
        }

    def training(self, name: str, active: float, seed: int) -> TrainConfig:
        """The training of one cell.

        Args:
            name: Of the architecture, whose own settings count.
            active: Fraction of the dense network's weights to hold; 0 for none.
            seed: Of the order of the text.
        """
        own = self.architectures[name].train
        return dataclasses.replace(self.train, **{**own, "active": active, "seed": seed})


def read_architectures(path: Path, overrides: Sequence[str] = ()) -> ArchitectureProtocol:
    """Read a protocol and apply overrides; see `build_architectures`.

    Args:
        path: A YAML file.
        overrides: `a.b=value` each, the value in YAML.
    """
    return build_architectures(read_values(path, "protocol", "architectures", overrides))


def build_architectures(values: Mapping[str, Any]) -> ArchitectureProtocol:
    """Build a protocol from plain data.

    Raises:
        InputError: Naming the field, the value and the remedy.
    """
    head = build_config(_Head, values, where="protocol")
    for name in head.plugins:
        import_plugin(name)
    check_seeds(head.seeds)
    if not isinstance(head.architectures, dict) or not head.architectures:
        raise InputError(
            "protocol.architectures must be a mapping of names to architectures, such as "
            "{dense: {}}"
        )
    model = _section(head.model, _NOT_MODEL, MixtureConfig, "protocol.model")
    fixed = {"active": 0.0, "distill": 0.0, "language": 1.0, "trains": "everything"}
    train = _section(head.train, _NOT_TRAIN, TrainConfig, "protocol.train", fixed)
    return ArchitectureProtocol(
        model=model,
        tokenizer=head.tokenizer,
        data=head.data,
        heldout=head.heldout,
        train=train,
        device=head.device,
        seeds=head.seeds,
        plugins=head.plugins,
        architectures={
            str(name): _architecture(str(name), item, model)
            for name, item in head.architectures.items()
        },
    )


def _architecture(name: str, item: Any, model: MixtureConfig) -> Architecture:
    where = f"protocol.architectures.{name}"
    check_name(where, name)
    found = build_config(Architecture, item or {}, where=where)
    _refuse(found.layer, _NOT_LAYER, f"{where}.layer")
    for option in found.train:
        if option not in OWN_TRAINING:
            raise InputError(
                f"{where}.train.{option} is the same for all; set it in protocol.train (an "
                f"architecture's own are {', '.join(OWN_TRAINING)})"
            )
    if "variable" in found.abilities and found.active is None:
        raise InputError(
            f"{where}.active must say how many experts a token uses on average, since "
            f"{found.router} decides it token by token; measure it once and give what came out"
        )
    # Names and settings that nobody knows are errors now.
    layers = tuple(found.layer_config(index, 1) for index in range(model.num_layers))
    for layer in {str(layer): layer for layer in layers}.values():
        if layer.router:
            build_config(
                ROUTERS.load_config(layer.router), layer.router_options, where=f"{where}.options"
            )
    dataclasses.replace(model, layers=layers, losses=found.losses)
    return found


def _section(
    values: Any,
    decided: Mapping[str, str],
    config: type,
    where: str,
    fixed: Mapping[str, Any] | None = None,
) -> Any:
    """Build a section, without what the protocol decides."""
    values = values or {}
    if not isinstance(values, dict):
        raise InputError(f"{where} must be a mapping of options, got {values!r}")
    _refuse(values, decided, where)
    return build_config(config, {**values, **(fixed or {})}, where=where)


def _refuse(values: Mapping[str, Any], decided: Mapping[str, str], where: str) -> None:
    for name, source in decided.items():
        if name in values:
            raise InputError(f"{where}.{name} comes from {source}; leave it out")


def _without(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    return {name: value for name, value in to_plain(config).items() if name not in names}
