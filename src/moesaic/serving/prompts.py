"""From text and messages to the tokens of a prompt, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from moesaic._errors import InputError


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]
) -> list[int]:
    """Put a conversation into the chat template, ready for the model's answer.

    Args:
        tokenizer: Of the model.
        messages: Each with `role` and `content`.

    Raises:
        InputError: If the tokenizer has no template, or its template refuses these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the tokenizer of this model has no chat template; give a prompt to go on from instead"
        )
    try:
        encoded: Any = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            return_dict=True,
            tokenize=True,
        )
    except TemplateError as error:
        raise InputError(f"the chat template refuses these messages: {error}") from error
    return list(encoded["input_ids"])


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text to go on from."""
    return list(tokenizer(text)["input_ids"])


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end the text, by the model's generation config and by the tokenizer."""
    of_model = model.generation_config.eos_token_id
    ids = of_model if isinstance(of_model, list) else [of_model]
    return frozenset(token for token in (*ids, tokenizer.eos_token_id) if token is not None)
