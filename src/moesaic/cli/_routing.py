"""Text coloured by the experts that its tokens used.

Shapes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from colorsys import hls_to_rgb
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.text import Text
from torch import Tensor

from moesaic._errors import InputError
from moesaic.analysis._colours import Scale, hex_colour, scale_for, text_colour
from moesaic.inference.activity import ActiveShare
from moesaic.inference.batching import Batch, Job, Stepper
from moesaic.serving.text import Detokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedToken:
    """A token and what writing it used.

    Attributes:
        text: What it adds to the text.
        active: Fraction of the feed-forward networks, the mean over layers.
        experts: Experts of every layer with a router, by the number of the layer.
    """

    text: str
    active: float
    experts: dict[int, list[int]]


class RoutedText:
    """Writes a sequence and tells what each token used.

    That is what the token before it used while it was read, which is when this one was chosen.

    Args:
        decoder: Of the model.
        share: Of the model.
        tokenizer: Of the model.
    """

    def __init__(self, decoder: Stepper, share: ActiveShare, tokenizer: Any) -> None:
        if not share.routed:
            raise InputError(
                "this model has no routers, so there is no routing to show; convert it first or "
                "leave out --show-routing"
            )
        self._batch = Batch(decoder, record=True)
        self._share = share
        self._tokenizer = tokenizer
        # Fitted to the prompt, so that the differences of a trained model can be seen.
        self.scale = Scale(low=0.0, high=1.0)

    def stream(self, job: Job) -> Iterator[RoutedToken]:
        """Give tokens as they come."""
        words = Detokenizer(self._tokenizer)
        self._batch.add(0, job)
        prompt: list[float] = []
        while (step := self._batch.step()) is not None:
            if step.prompt_rows:
                assert step.used_LTE is not None
                prompt += self._share.of(step.used_LTE).tolist()
                self.scale = scale_for(prompt)
            for written in step.written:
                assert written.used_LE is not None
                text = "" if written.token is None else words.add(written.token)
                text += words.rest() if written.finish else ""
                if written.token is not None or text:
                    yield self._token(text, written.used_LE)

    def _token(self, text: str, used_LE: Tensor) -> RoutedToken:
        return RoutedToken(
            text=text,
            active=float(self._share.of(used_LE.unsqueeze(1))[0]),
            experts={i: used_LE[i].nonzero().flatten().tolist() for i in self._share.routed},
        )


def show_routing(console: Console, text: RoutedText, job: Job, layer: int | None) -> None:
    """Print a text as it comes: coloured on a terminal, a line for each token elsewhere.

    Args:
        console: Where to.
        text: What to write it with.
        job: What to write.
        layer: Colour by the set of experts of this layer; by the active fraction if none.
    """
    sets: dict[tuple[int, ...], str] = {}
    for token in text.stream(job):
        used = None if layer is None else tuple(token.experts[layer])
        if not console.is_terminal:
            columns = [f"{token.active:.3f}"]
            if used is not None:
                columns.append(",".join(map(str, used)) or "-")
            # Not through rich, which makes spaces of tabs.
            console.file.write("\t".join([*columns, repr(token.text)]) + "\n")
            console.file.flush()
            continue
        if used is None:
            level = text.scale.level(token.active)
            style = Style(color=_ink(text_colour(level)), bgcolor=hex_colour(level))
        else:
            style = Style(color="#000000", bgcolor=sets.setdefault(used, _hue(len(sets))))
        console.print(Text(token.text, style), end="", soft_wrap=True)
    if console.is_terminal:
        console.print("\n")
        console.print(_legend(text.scale, layer, sets))


def _ink(short: str) -> str:
    return {"#fff": "#ffffff", "#000": "#000000"}[short]


def _hue(index: int) -> str:
    """Bright colours, each as far as can be from those before it: turns by the golden ratio."""
    red, green, blue = hls_to_rgb(index * 0.61803398875 % 1.0, 0.75, 0.7)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _legend(scale: Scale, layer: int | None, sets: dict[tuple[int, ...], str]) -> Text:
    legend = Text()
    if layer is None:
        legend.append(f"active: {scale.low:.0%} ")
        first, last = scale.level(scale.low), scale.level(scale.high)
        for level in range(first, last + 1):
            legend.append(" ", Style(bgcolor=hex_colour(level)))
        return legend.append(f" {scale.high:.0%}")
    legend.append(f"experts of layer {layer}:")
    for used, colour in sets.items():
        legend.append(" ")
        names = ",".join(map(str, used)) or "none"
        legend.append(f" {names} ", Style(color="#000000", bgcolor=colour))
    return legend
