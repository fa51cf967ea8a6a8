"""What a reader wants to see: text coloured by how much each token used, and text models write.

Shapes: S tokens of one text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from moesaic.evaluation._mode import measuring
from moesaic.evaluation.activity import record_use, token_fractions
from moesaic.models.ffn import dense_ffn_width

# What a decoder shows for bytes that are not yet a character.
_INCOMPLETE = "\ufffd"


def coloured_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids_S: NDArray[Any]
) -> list[dict[str, Any]]:
    """Give each token of a text with its active fraction, the mean over layers.

    Args:
        model: With MoE layers.
        tokenizer: Of the model.
        ids_S: The text, [S].

    Returns:
        Per token its `text` and `active`; the texts together are the text.
    """
    ids_BS = torch.from_numpy(np.asarray(ids_S, np.int64)).to(model.device)[None]
    with measuring(model), record_use(model) as uses:
        model(input_ids=ids_BS, use_cache=False, logits_to_keep=1)
    active_S = token_fractions(model, uses, dense_ffn_width(model.config)).tolist()
    pieces = token_texts(tokenizer, ids_BS[0].tolist())
    return [{"text": t, "active": a} for t, a in zip(pieces, active_S, strict=True)]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Split the text of some tokens among them.

    Tokens may end inside a character, so each gets what it adds to the text before it, and the one
    that completes a character gets that character.
    """
    pieces = []
    done = ""
    for end in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[:end])
        if end < len(ids):
            text = text.rstrip(_INCOMPLETE)
        pieces.append(text[len(done) :])
        done = text if len(text) > len(done) else done
    return pieces


def generate_text(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    num_tokens: int,
) -> dict[str, str]:
    """Let every model continue a prompt, greedily.

    Args:
        models: By name.
        tokenizer: Of all of them.
        prompt: Not empty.
        num_tokens: At most so many new tokens; fewer if the model ends the text.

    Returns:
        The new text of each model, without the prompt.
    """
    ids_BS = torch.tensor([tokenizer(prompt)["input_ids"]])
    texts = {}
    for name, model in models.items():
        end = model.generation_config.eos_token_id if model.generation_config else None
        make: Any = GenerationConfig
        settings = make(
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=_first(tokenizer.pad_token_id, end, 0),
        )
        inputs = ids_BS.to(model.device)
        # transformers declares its models' modules in a way that hides this method's type.
        generate: Any = model.generate
        with measuring(model):
            out_BS = generate(
                inputs, attention_mask=torch.ones_like(inputs), generation_config=settings
            )
        new = out_BS[0, ids_BS.shape[1] :].tolist()
        texts[name] = str(tokenizer.decode(new, skip_special_tokens=True))
    return texts


def _first(*candidates: int | list[int] | None) -> int:
    """The first that is there; of a list, its first."""
    for candidate in candidates:
        if isinstance(candidate, list):
            return candidate[0]
        if candidate is not None:
            return candidate
    return 0


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
