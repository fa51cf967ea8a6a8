"""Parameters in groups for an optimiser: routers and some others learn at rates of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moesaic.nn.layer import moe_layers
from moesaic.nn.part import Part


def parameter_groups(
    model: nn.Module, rate: float, router_rate: float | None = None
) -> list[dict[str, Any]]:
    """Group the parameters that train, for any optimiser of torch.

    Args:
        model: A model with MoE layers.
        rate: Learning rate of all that has no other.
        router_rate: Learning rate of routers, which then have no weight decay; none treats them as
            the rest.

    Returns:
        Groups with `params` and `lr`, none of them empty: routers, the rest, then one for each
        factor by which parts want some of their parameters faster (`Part.rate_factors`). The last
        have a `weight_decay` of zero.
    """
    factors: dict[Tensor, float] = {}
    for module in model.modules():
        if isinstance(module, Part):
            named = dict(module.named_parameters(recurse=False))
            factors |= {named[name]: factor for name, factor in module.rate_factors.items()}
    of_routers: set[Tensor] = set()
    if router_rate is not None:
        of_routers = {
            parameter
            for layer in moe_layers(model)
            for router in layer.routers()
            for parameter in router.parameters()
        }
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain = [parameter for parameter in trains if parameter not in factors]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in plain if p in of_routers],
            "lr": router_rate,
            "weight_decay": 0.0,
        },
        {"params": [p for p in plain if p not in of_routers], "lr": rate},
    ]
    for factor in sorted(set(factors.values())):
        own = [p for p in trains if factors.get(p) == factor]
        groups.append({"params": own, "lr": factor * rate, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]
