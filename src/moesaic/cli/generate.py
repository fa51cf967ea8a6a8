"""Write text with a dense or converted model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from moesaic._errors import InputError
from moesaic.cli._common import parse, quiet_libraries, show
from moesaic.models.checkpoint import MANIFEST, load, load_dense, load_tokenizer, read_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Write text with a dense or converted model, greedily, as it comes.

    Attributes:
        model: A checkpoint of ours, or a dense model.
        prompt: The text to go on from.
        max_new_tokens: Tokens to write at most.
        chat: Put the prompt into the chat template of the tokenizer.
        json: Print one JSON document instead of streaming.
    """

    model: tyro.conf.Positional[str]
    prompt: str
    max_new_tokens: int = 64
    chat: bool = False
    json: bool = False


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "generate")
    quiet_libraries()
    if options.max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {options.max_new_tokens}")
    if not options.prompt:
        raise InputError("prompt must not be empty; give some text to go on from")
    converted = read_config(options.model).model_type.startswith("moesaic_")
    ours = converted or (Path(options.model) / MANIFEST).is_file()
    tokenizer = load_tokenizer(options.model)
    if options.chat and not getattr(tokenizer, "chat_template", None):
        raise InputError(f"the tokenizer of {options.model} has no chat template; leave out --chat")
    model = load(options.model) if ours and converted else load_dense(options.model)
    from transformers import TextStreamer

    inputs: Any
    if options.chat:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": options.prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(options.prompt, return_tensors="pt")
    streamer = None
    if not options.json:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids_BS: Any = model.generate(  # type: ignore[operator]
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        streamer=streamer,
    )
    new_S = ids_BS[0, inputs["input_ids"].shape[1] :]
    if options.json:
        text = tokenizer.decode(new_S, skip_special_tokens=True)
        show({"prompt": options.prompt, "text": text, "tokens": len(new_S)}, as_json=True)
    return 0
