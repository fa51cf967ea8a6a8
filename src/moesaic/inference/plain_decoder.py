"""The same steps as `Decoder`, by the model's own forward: for what has no native decoder.

Each sequence has a cache of its own and is read by itself, because the products of a padded batch
round differently from those of one sequence; a batch gives no more speed, but the same text.

Shapes: T rows (tokens of any mix of sequences), L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from moesaic._errors import InputError
from moesaic.models.ffn import decoder_layers
from moesaic.nn.layer import MoELayer, record_routing
from moesaic.nn.operating_point import threshold_at
from moesaic.nn.routing import Routing


class PlainDecoder:
    """A model in transformers and the caches of its sequences.

    Args:
        model: Dense, or one of ours.
        length: Positions of a sequence.
        slots: Sequences that are kept.
    """

    # The products of transformers round by how many rows they have.
    any_rows = False

    def __init__(self, model: PreTrainedModel, *, length: int = 2048, slots: int = 1) -> None:
        if length < 1 or slots < 1:
            raise InputError(f"length and slots must be at least 1, got {length} and {slots}")
        self.model: Any = model.eval()
        self.length = length
        self.slots = slots
        layers = decoder_layers(model)
        self.num_layers = len(layers)
        self._routed = [
            (i, module.config.num_candidates)
            for i, layer in enumerate(layers)
            for module in layer.modules()
            if isinstance(module, MoELayer)
            for _ in module.turns()
        ]
        self.num_experts = max((count for _, count in self._routed), default=1)
        self._caches = [DynamicCache(config=model.config) for _ in range(slots)]

    @torch.no_grad()
    def step(
        self,
        ids_T: Tensor,
        slot_T: Tensor,
        position_T: Tensor,
        rows: Iterable[int],
        *,
        threshold_T: Tensor | None = None,
        used_LTE: Tensor | None = None,
    ) -> Tensor:
        """Read tokens and give logits after some of them; see `Decoder.step`."""
        wanted = list(rows)
        logits: dict[int, Tensor] = {}
        if used_LTE is not None:
            used_LTE.zero_()
        for slot, group in groupby(range(len(ids_T)), key=lambda row: int(slot_T[row])):
            part = list(group)
            first, last = part[0], part[-1] + 1
            mine = [row for row in wanted if first <= row < last]
            start = int(position_T[first])
            if start + len(part) > self.length:
                raise InputError(
                    f"positions must be in [0, {self.length}), got {start + len(part) - 1}; make "
                    "the decoder with a larger length"
                )
            if start == 0:
                self._caches[slot] = DynamicCache(config=self.model.config)
            threshold = float("nan") if threshold_T is None else float(threshold_T[first])
            with self._at(threshold), record_routing(self.model) as routings:
                out_1RV = self.model(
                    input_ids=ids_T[first:last].unsqueeze(0).to(self.model.device),
                    past_key_values=self._caches[slot],
                    use_cache=True,
                    # One row at least, so that no model is asked for none.
                    logits_to_keep=torch.tensor([row - first for row in mine] or [0]),
                ).logits
            logits.update(zip(mine, out_1RV[0].float().cpu(), strict=False))
            if used_LTE is not None:
                self._mark(used_LTE[:, first:last], routings)
        empty = torch.empty(0, self.model.config.vocab_size)
        return torch.stack([logits[row] for row in wanted]) if wanted else empty

    def _mark(self, used_LTE: Tensor, routings: list[Routing]) -> None:
        for (i, count), routing in zip(self._routed, routings, strict=True):
            used_LTE[i, :, :count] += routing.active_TE().cpu()

    @contextmanager
    def _at(self, threshold: float) -> Iterator[None]:
        own = threshold != threshold
        with nullcontext() if own else threshold_at(self.model, threshold):
            yield
