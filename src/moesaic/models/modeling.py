"""Converted models as ordinary transformers models.

For each architecture a config class and a causal language model class are made from its parents
in transformers: same names, same attention, same cache, same generation; only the feed-forward
networks are MoE layers, as `config.moesaic` describes them, and the loss contains theirs.

Shapes: B sequences, S positions, T = B * S tokens, E experts.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from moesaic._config import build_config
from moesaic._errors import InputError
from moesaic.models.architectures import ARCHITECTURES, Architecture
from moesaic.models.ffn import decoder_layers, put_layer
from moesaic.models.remote import write_code
from moesaic.nn.bypass import Bypass
from moesaic.nn.experts._base import Experts
from moesaic.nn.free import FreeExperts
from moesaic.nn.layer import (
    LayerConfig,
    MoELayer,
    link_layers,
    moe_layers,
    pass_state,
    record_routing,
)
from moesaic.nn.losses._base import Passes
from moesaic.nn.losses._table import LOSSES
from moesaic.nn.routers._base import Router
from moesaic.nn.routing import Routing


@dataclass(slots=True)
class LossTerm:
    """A loss of the model: what it computes and how much it counts.

    Attributes:
        function: Of what it judges, the token mask and the settings.
        config: Its settings.
        coef: How much it counts.
        two_passes: Whether it judges the logits of two passes, and not the routing of a layer.
    """

    function: Any
    config: Any
    coef: float
    two_passes: bool


class MoesaicMixin:
    """What a converted model adds to its parent class."""

    config: Any
    loss_terms: dict[str, LossTerm]

    def attach_moe(self) -> None:
        """Replace the networks by the layers of `config.moesaic`, with fresh weights."""
        assert isinstance(self, PreTrainedModel)
        row = ARCHITECTURES[self.config.model_type.removeprefix("moesaic_")]
        for layer, values in zip(decoder_layers(self), self.config.moesaic["layers"], strict=True):
            config = build_config(LayerConfig, values, where="config.moesaic.layers")
            put_layer(layer, row, MoELayer(self.config.hidden_size, config))
        link_layers(self)
        self.attach_losses()

    def attach_losses(self) -> None:
        """Build the losses of `config.moesaic`."""
        self.loss_terms = {}
        for name, values in self.config.moesaic.get("losses", {}).items():
            options = {k: v for k, v in values.items() if k != "coef"}
            config = build_config(LOSSES.load_config(name), options, where=f"loss {name}")
            self.loss_terms[name] = LossTerm(
                LOSSES.load(name),
                config,
                float(values["coef"]),
                "two-passes" in LOSSES[name].abilities,
            )

    def set_loss_coef(self, name: str, coef: float) -> None:
        """Change how much a loss counts, here and in the config that is saved."""
        self.loss_terms[name].coef = coef
        self.config.moesaic["losses"][name]["coef"] = coef

    def routing_loss(self, routings: list[Routing], mask_BS: Tensor) -> Tensor:
        """Sum the losses, each a mean over layers, and what routers themselves charge.

        Args:
            routings: Routing of every layer.
            mask_BS: True where a token is not padding.

        Returns:
            A scalar in float32.

        Raises:
            InputError: If routers that train were recorded without their gradient.
        """
        if self.loss_terms and torch.is_grad_enabled():
            self._check_gradient(routings)
        total = torch.zeros((), device=mask_BS.device)
        for term in self.loss_terms.values():
            if term.two_passes:
                continue
            losses = [term.function(routing, mask_BS, term.config) for routing in routings]
            total = total + term.coef * torch.stack(losses).mean()
        for routing in routings:
            for loss in routing.aux.values():
                total = total + loss / len(routings)
        return total

    def passes_loss(self, passes: Passes, mask_BS: Tensor) -> Tensor:
        """Sum the losses that judge two passes over the same text.

        Args:
            passes: Their logits.
            mask_BS: True where a prediction counts.

        Returns:
            A scalar in float32.
        """
        total = torch.zeros((), device=mask_BS.device)
        for term in self.loss_terms.values():
            if term.two_passes:
                total = total + term.coef * term.function(passes, mask_BS, term.config)
        return total

    def _check_gradient(self, routings: list[Routing]) -> None:
        """Refuse the one form of recomputation that would drop the losses' gradient unsaid."""
        assert isinstance(self, nn.Module)
        routers = [router for layer in moe_layers(self) for router in layer.routers()]
        weights = [p for router in routers for p in router.parameters()]
        all_train = bool(weights) and all(p.requires_grad for p in weights)
        # Routers without weights have no gradient either way.
        if all_train and not any(routing.scores_TE.requires_grad for routing in routings):
            raise InputError(
                "gradient checkpointing with use_reentrant=True gives the routing losses no "
                "gradient; set use_reentrant to False in gradient_checkpointing_kwargs"
            )

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (Bypass, Experts, FreeExperts, Router)):
            module.reset_parameters()
        elif isinstance(module, MoELayer):
            if module.output_bias is not None:
                nn.init.zeros_(module.output_bias)
        else:
            super()._init_weights(module)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: `save_pretrained` writes all the code, where transformers would write less.

        It would name the module of this class as the entry, which imports the methods lazily.
        """

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Save as transformers does, with the code that loads it where moesaic is missing."""
        name = type(self).__name__.removesuffix("ForCausalLM")
        self.config.auto_map = {
            "AutoConfig": f"modeling_moesaic.{name}Config",
            "AutoModelForCausalLM": f"modeling_moesaic.{name}ForCausalLM",
        }
        super().save_pretrained(save_directory, **options)  # type: ignore[misc]
        write_code(save_directory)


def _token_mask(input_BS: Tensor, attention_mask: Tensor | None) -> Tensor:
    """True where a token of this forward is not padding, [B, S]."""
    num_sequences, length = input_BS.shape[:2]
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.ones(num_sequences, length, dtype=torch.bool, device=input_BS.device)
    return attention_mask[:, -length:].bool()


def _make_forward(parent: type[PreTrainedModel]) -> Any:
    """Wrap a parent's forward: same parameters plus `output_router_logits`."""
    parent_forward = parent.forward
    signature = inspect.signature(parent_forward)

    @functools.wraps(parent_forward)
    def forward(
        self: Any,
        *args: Any,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        bound = signature.bind_partial(self, *args, **kwargs).arguments
        labels = bound.get("labels")
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if labels is None and not output_router_logits:
            with pass_state(self, bound.get("input_ids")):
                return parent_forward(self, *args, return_dict=return_dict, **kwargs)

        def run() -> Any:
            with pass_state(self, bound.get("input_ids")):
                return parent_forward(self, *args, return_dict=True, **kwargs)

        second: Any = None
        with record_routing(self) as routings:
            out = run()
            if self.training and any(term.two_passes for term in self.loss_terms.values()):
                second = run()
        inputs = bound.get("input_ids")
        if inputs is None:
            inputs = bound["inputs_embeds"]
        mask_BS = _token_mask(inputs, bound.get("attention_mask"))
        aux_loss: Tensor | None = self.routing_loss(routings, mask_BS) if routings else None
        loss = out.loss
        if second is not None:
            passes = Passes(out.logits.flatten(0, 1), second.logits.flatten(0, 1))
            judged = self.passes_loss(passes, _predicts(labels, kwargs, mask_BS))
            aux_loss = judged if aux_loss is None else aux_loss + judged
            loss = None if loss is None else loss + second.loss
        if loss is not None and labels is not None and aux_loss is not None:
            loss = loss + aux_loss * _share_of_batch(labels, kwargs)
        # transformers annotates a tuple of one.
        scores: Any = None
        if output_router_logits:
            scores = tuple(routing.scores_TE for routing in routings)
        result = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            router_logits=scores,
        )
        return result.to_tuple() if return_dict is False else result

    parameters = list(signature.parameters.values())
    extra = inspect.Parameter(
        "output_router_logits", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="bool"
    )
    has_rest = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    parameters.insert(len(parameters) - has_rest, extra)
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


def _shifted(labels: Tensor, options: Mapping[str, Any]) -> Tensor:
    """What each position but the last is to predict, or each where the caller has shifted."""
    shifted: Tensor | None = options.get("shift_labels")
    return labels[..., 1:] if shifted is None else shifted


def _predicts(labels: Tensor | None, options: Mapping[str, Any], mask_BS: Tensor) -> Tensor:
    """True where a prediction counts, [B, S]: where it has a label, or without labels all text."""
    if labels is None:
        return mask_BS
    counted = _shifted(labels, options) != -100
    return torch.nn.functional.pad(counted, (0, mask_BS.shape[1] - counted.shape[1]))


def _share_of_batch(labels: Tensor, options: Mapping[str, Any]) -> Any:
    """Part of a batch that this forward holds, so that accumulated auxiliary losses are a mean."""
    num_items = options.get("num_items_in_batch")
    if num_items is None:
        return 1.0
    return (_shifted(labels, options) != -100).sum() / num_items


@functools.cache
def moesaic_classes(row: Architecture) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Make the config and model class of an architecture; the same ones at every call."""
    parent_config: type[PreTrainedConfig] = getattr(transformers, row.name + row.config)
    parent_model: type[PreTrainedModel] = getattr(transformers, row.name + row.head)

    def init(self: Any, config: Any) -> None:
        parent_model.__init__(self, config)
        self.attach_moe()

    config_class = type(
        f"Moesaic{row.name}Config",
        (parent_config,),
        {
            "__module__": __name__,
            "__doc__": f"{parent_config.__name__} with `moesaic`, its MoE layers and losses.",
            "__annotations__": {"moesaic": "dict | None", "output_router_logits": "bool"},
            "model_type": row.moesaic_type,
            "base_model_tp_plan": None,
            "moesaic": None,
            "output_router_logits": False,
            "register_for_auto_class": classmethod(lambda cls, auto_class=None: None),
        },
    )
    model_class = type(
        f"Moesaic{row.name}ForCausalLM",
        (MoesaicMixin, parent_model),
        {
            "__module__": __name__,
            "__doc__": f"{parent_model.__name__} whose networks are MoE layers.",
            "__init__": init,
            "forward": _make_forward(parent_model),
            "config_class": config_class,
        },
    )
    return config_class, model_class


def __getattr__(name: str) -> Any:
    """Give the class of a name such as `MoesaicLlamaForCausalLM`."""
    for row in ARCHITECTURES.values():
        if name in (f"Moesaic{row.name}Config", f"Moesaic{row.name}ForCausalLM"):
            return moesaic_classes(row)[name.endswith("ForCausalLM")]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def register_classes(
    row: Architecture,
) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Give transformers' auto classes the classes of an architecture, and return them."""
    config_class, model_class = moesaic_classes(row)
    transformers.AutoConfig.register(row.moesaic_type, config_class, exist_ok=True)
    transformers.AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return config_class, model_class


def adopt(model: PreTrainedModel, moesaic: Mapping[str, Any]) -> PreTrainedModel:
    """Turn a dense model, in place and without copying a weight, into its converted class.

    Its networks are still the dense ones; the caller replaces them one by one with `put_layer`.

    Args:
        model: A dense model of a known architecture; it is consumed.
        moesaic: Plain data for `config.moesaic`.

    Returns:
        The same object, now of the converted class.
    """
    row = ARCHITECTURES[model.config.model_type]
    config_class, model_class = register_classes(row)
    dense_config = model.config
    values = {k: v for k, v in dense_config.to_dict().items() if k != "model_type"}
    config: Any = config_class(**{**values, "moesaic": copy.deepcopy(dict(moesaic))})
    config._attn_implementation = dense_config._attn_implementation
    # Every module that reads the config must read the new one.
    for module in model.modules():
        if getattr(module, "config", None) is dense_config:
            module.config = config
    model.__class__ = model_class
    assert isinstance(model, MoesaicMixin)
    model.attach_losses()
    return model
