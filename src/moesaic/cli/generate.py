"""Write text with a dense or converted model."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from moesaic._config import to_plain
from moesaic._errors import InputError, RunError
from moesaic.cli._common import parse, quiet_libraries, show
from moesaic.inference.batching import Job
from moesaic.inference.engine import Engine, Sampling
from moesaic.models.checkpoint import load_any, load_tokenizer
from moesaic.serving.prompts import chat_ids, stop_ids, text_ids


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
        show_routing: Colour each token by how much of the networks writing it used; where the
            output is no terminal, print a line for each token with the fraction in front.
        routing_layer: Colour by which experts of this layer were used instead, and print these.
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
    show_routing: bool = False
    routing_layer: int | None = None
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
    if options.routing_layer is not None and not options.show_routing:
        raise InputError(
            f"routing_layer {options.routing_layer} says how routing is shown; add --show-routing"
        )
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    import torch
    from transformers import TextStreamer

    tokenizer = load_tokenizer(options.model)
    if options.chat and not getattr(tokenizer, "chat_template", None):
        raise InputError(f"the tokenizer of {options.model} has no chat template; leave out --chat")
    if options.chat:
        prompt_T = chat_ids(tokenizer, [{"role": "user", "content": options.prompt}])
    else:
        prompt_T = text_ids(tokenizer, options.prompt)
    model = load_any(options.model)
    stop = stop_ids(model, tokenizer)
    if options.show_routing:
        return _show_routing(model, tokenizer, prompt_T, options, stop, sampling)
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


def _show_routing(
    model: Any,
    tokenizer: Any,
    prompt_T: list[int],
    options: Options,
    stop: frozenset[int],
    sampling: Sampling,
) -> int:
    """Write with the experts of every token."""
    from rich.console import Console

    from moesaic.cli._routing import RoutedText, show_routing
    from moesaic.inference import PlainDecoder
    from moesaic.inference.activity import ActiveShare

    share = ActiveShare(model)
    layer = options.routing_layer
    if layer is not None and share.routed and layer not in share.routed:
        raise InputError(
            f"routing_layer must be one of {sorted(share.routed)}, which have routers, got {layer}"
        )
    length = len(prompt_T) + options.max_new_tokens
    engine = _engine(model, length, options) if share.routed else None
    decoder = PlainDecoder(model, length=length) if engine is None else engine.decoder
    text = RoutedText(decoder, share, tokenizer)
    job = Job(
        prompt_T=prompt_T, max_new_tokens=options.max_new_tokens, stop=stop, sampling=sampling
    )
    if options.json:
        tokens = [to_plain(token) for token in text.stream(job)]
        written = "".join(token["text"] for token in tokens)
        show({"prompt": options.prompt, "text": written, "tokens": tokens}, as_json=True)
    else:
        show_routing(Console(), text, job, layer)
    return 0


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
    model: Any, prompt_T: list[int], options: Options, stop: frozenset[int], streamer: Any
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
