"""Write text with a dense or converted model."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from moesaic._errors import InputError, RunError
from moesaic.cli._common import parse, quiet_libraries, show
from moesaic.inference.engine import Engine, Sampling
from moesaic.models.checkpoint import MANIFEST, load, load_dense, load_tokenizer, read_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Write text with a dense or converted model as it comes.

    Attributes:
        model: A checkpoint of ours, or a dense model.
        prompt: The text to go on from.
        max_new_tokens: Tokens to write at most.
        chat: Put the prompt into the chat template of the tokenizer.
        engine: `native` is the decode engine for CPUs, `transformers` the model's own generate;
            `auto` takes the first where it can and says when it cannot.
        weights: How the native engine stores weights; `auto` as the checkpoint has them. `int8`
            is rounded, a little worse and the fastest.
        temperature: 0 takes the most likely token, more samples.
        top_p: Smallest probability mass that is sampled from.
        seed: Of the samples.
        json: Print one JSON document instead of streaming.
    """

    model: tyro.conf.Positional[str]
    prompt: str
    max_new_tokens: int = 64
    chat: bool = False
    engine: Literal["auto", "native", "transformers"] = "auto"
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    json: bool = False


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "generate")
    quiet_libraries()
    if options.max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {options.max_new_tokens}")
    if not options.prompt:
        raise InputError("prompt must not be empty; give some text to go on from")
    if options.engine == "transformers" and options.weights != "auto":
        raise InputError(
            f"weights {options.weights!r} are of the native engine; leave out --weights or choose "
            "--engine native"
        )
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    converted = read_config(options.model).model_type.startswith("moesaic_")
    ours = converted or (Path(options.model) / MANIFEST).is_file()
    import torch
    from transformers import TextStreamer

    tokenizer = load_tokenizer(options.model)
    if options.chat and not getattr(tokenizer, "chat_template", None):
        raise InputError(f"the tokenizer of {options.model} has no chat template; leave out --chat")
    model = load(options.model) if ours and converted else load_dense(options.model)
    prompt_T = _prompt(tokenizer, options)
    stop = _stop_ids(model, tokenizer)
    engine = _engine(model, len(prompt_T) + options.max_new_tokens, options)
    started = time.perf_counter()
    streamer = None
    if not options.json:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if engine is None:
        new_ids = _with_transformers(model, prompt_T, options, stop, streamer)
    else:
        new_ids = []
        if streamer is not None:
            streamer.put(torch.tensor(prompt_T))
        for token in engine.stream(prompt_T, options.max_new_tokens, stop=stop, sampling=sampling):
            new_ids.append(token)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
    if options.json:
        document = {
            "prompt": options.prompt,
            "text": tokenizer.decode(new_ids, skip_special_tokens=True),
            "tokens": len(new_ids),
            "engine": "transformers" if engine is None else "native",
            "seconds": time.perf_counter() - started,
        }
        show(document, as_json=True)
    return 0


def _prompt(tokenizer: Any, options: Options) -> list[int]:
    if not options.chat:
        return list(tokenizer(options.prompt)["input_ids"])
    messages = [{"role": "user", "content": options.prompt}]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, tokenize=True
    )
    return list(encoded["input_ids"])


def _stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end the text, by the model's generation config and by the tokenizer."""
    of_model = model.generation_config.eos_token_id
    ids = of_model if isinstance(of_model, list) else [of_model]
    return {token for token in (*ids, tokenizer.eos_token_id) if token is not None}


def _engine(model: Any, length: int, options: Options) -> Engine | None:
    """The native engine, or none when transformers is to generate; says why."""
    if options.engine == "transformers":
        return None
    weights = None if options.weights == "auto" else options.weights
    try:
        return Engine(model, weight_format=weights, length=length)
    except (InputError, RunError) as error:
        if options.engine == "native" or weights is not None:
            raise
        print(f"generating with transformers: {error}", file=sys.stderr)
        return None


def _with_transformers(
    model: Any, prompt_T: list[int], options: Options, stop: set[int], streamer: Any
) -> list[int]:
    """Generate with the model's own method; gives the new tokens, without one of `stop`."""
    import torch

    torch.manual_seed(options.seed)
    ids_1T = torch.tensor([prompt_T])
    choice: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0.0:
        choice = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
    out_1T = model.generate(
        input_ids=ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=options.max_new_tokens,
        eos_token_id=sorted(stop) or None,
        pad_token_id=min(stop, default=0),
        streamer=streamer,
        **choice,
    )
    return list(
        itertools.takewhile(lambda token: token not in stop, out_1T[0, len(prompt_T) :].tolist())
    )
