"""How a server is set up."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from moesaic._errors import InputError
from moesaic.inference.decoder import MAX_ROWS

KEY_VARIABLE = "MOESAIC_API_KEY"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Settings of `moesaic serve`.

    Attributes:
        host: Address to listen on; the default is reached from this machine alone.
        port: 0 takes a free one.
        name: What clients call the model; the last part of its path if empty.
        api_key: What clients must send; none is asked for if empty. Better set in the environment
            variable MOESAIC_API_KEY, which other users of the machine cannot read.
        slots: Sequences written at once; each keeps keys and values of `length` positions.
        queue: Sequences that may wait for a slot; more are refused with 429.
        length: Positions of a sequence, prompt included; at most what the model was made for.
        max_tokens: New tokens that a request may ask for.
        max_choices: Sequences that one request may ask for.
        max_body_bytes: Size of a request.
        timeout_s: Seconds that a request may take, waiting included.
        drain_s: Seconds that running requests get to end after SIGTERM.
        rows: Tokens read in a step; a smaller number delays the others less while a long prompt
            is read.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    api_key: str = field(default_factory=lambda: os.environ.get(KEY_VARIABLE, ""), repr=False)
    slots: int = 8
    queue: int = 64
    length: int = 2048
    max_tokens: int = 1024
    max_choices: int = 16
    max_body_bytes: int = 1_000_000
    timeout_s: float = 600.0
    drain_s: float = 30.0
    rows: int = 256

    def __post_init__(self) -> None:
        for name in ("slots", "max_tokens", "max_choices", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        if self.length < 2:
            raise InputError(f"length must be at least 2, got {self.length}; raise it")
        if self.queue < 0:
            raise InputError(f"queue must be at least 0, got {self.queue}; 0 lets nobody wait")
        if not 0 <= self.port <= 65535:
            raise InputError(f"port must be in [0, 65535], got {self.port}; 0 takes a free one")
        if not self.slots <= self.rows <= MAX_ROWS:
            raise InputError(
                f"rows must be in [slots={self.slots}, {MAX_ROWS}], got {self.rows}; a step "
                "reads a token of every sequence"
            )
        for name in ("timeout_s", "drain_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}; raise it")
