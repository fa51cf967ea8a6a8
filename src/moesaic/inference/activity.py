"""How much of the feed-forward networks a token used, from the experts that it used.

Shapes: T tokens, L layers, E experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.models.ffn import decoder_layers, dense_ffn_width
from moesaic.nn.layer import MoELayer
from moesaic.nn.shape import layer_shape


class ActiveShare:
    """The active fraction of tokens, the mean over the layers of a model.

    Args:
        model: Dense or converted; read once.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        always, each = [], []
        # Layers with a router, and the experts of each.
        self.routed: dict[int, int] = {}
        for i, layer in enumerate(decoder_layers(model)):
            moe = next((m for m in layer.modules() if isinstance(m, MoELayer)), None)
            if moe is None:
                always.append(1.0)
                each.append(0.0)
                continue
            shape = layer_shape(moe, dense_ffn_width(model.config))
            always.append(shape.fraction(0.0))
            if moe.router is None:
                each.append(0.0)
                continue
            each.append(shape.fraction(1.0) - always[-1])
            self.routed[i] = moe.config.num_candidates
        self._always = np.asarray(always)
        self._each = np.asarray(each)

    def of(self, used_LTE: Tensor) -> NDArray[np.float64]:
        """Give the active fraction of every token, [T].

        Args:
            used_LTE: How often a token used each expert, [L, T, E] uint8.
        """
        count_LT = used_LTE.sum(2).numpy()
        fraction_LT = self._always[:, None] + self._each[:, None] * count_LT
        mean_T: NDArray[np.float64] = fraction_LT.mean(0)
        return mean_T
