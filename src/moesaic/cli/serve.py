"""Serve a model with the protocol of OpenAI."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from moesaic._errors import InputError
from moesaic.cli._common import parse, quiet_libraries
from moesaic.serving.config import KEY_VARIABLE, ServeConfig

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Serve a dense or converted model with the protocol of OpenAI, many requests at once.

    Attributes:
        model: A checkpoint of ours, or a dense model.
        engine: `native` is the decode engine for CPUs, `transformers` the model's own forward, one
            sequence at a time; `auto` takes the first where it can and says when it cannot.
        weights: How the native engine stores weights; `auto` as the checkpoint has them. `int8`
            is rounded, a little worse and the fastest.
        serve: Settings of the server.
    """

    model: tyro.conf.Positional[str]
    engine: Literal["auto", "native", "transformers"] = "auto"
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    serve: Annotated[ServeConfig, tyro.conf.arg(name="")] = field(default_factory=ServeConfig)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "serve")
    quiet_libraries()
    if options.engine == "transformers" and options.weights != "auto":
        raise InputError(
            f"weights {options.weights!r} are of the native engine; leave out --weights or choose "
            "--engine native"
        )
    try:
        from moesaic.serving.model import ServedModel
        from moesaic.serving.server import open_socket, serve
    except ImportError as error:
        raise ImportError(
            f"moesaic serve needs {error.name}; pip install 'moesaic[serve]'"
        ) from error
    config = options.serve
    if config.host not in _LOOPBACK and not config.api_key:
        print(
            f"serving to whoever reaches {config.host}, without a key; set {KEY_VARIABLE}",
            file=sys.stderr,
        )
    # The address first: a model is not loaded for one that is taken.
    with open_socket(config) as listener:
        served = ServedModel(
            options.model,
            config,
            native={"auto": None, "native": True, "transformers": False}[options.engine],
            weight_format=None if options.weights == "auto" else options.weights,
        )

        def ready(address: str) -> None:
            print(f"serving {served.name} at {address}", file=sys.stderr, flush=True)

        serve(served, listener, ready)
    return 0
