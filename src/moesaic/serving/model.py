"""A model made ready to be served: packed, with its tokenizer, its line and its measures."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from openai.types import Model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic._errors import InputError, RunError
from moesaic.inference.activity import ActiveShare
from moesaic.inference.batching import Batch, Stepper
from moesaic.inference.decoder import Decoder
from moesaic.inference.plain_decoder import PlainDecoder
from moesaic.models.checkpoint import load_any, load_tokenizer
from moesaic.nn.layer import moe_layers
from moesaic.nn.operating_point import threshold_routers
from moesaic.ops.cpu.packed import Format
from moesaic.serving.config import ServeConfig
from moesaic.serving.metrics import Metrics
from moesaic.serving.operating import OperatingCurve, measure_curve, measuring_text
from moesaic.serving.prompts import stop_ids
from moesaic.serving.worker import Worker

logger = logging.getLogger(__name__)


class ServedModel:
    """A model and everything that belongs to serving it.

    Args:
        source: A checkpoint of ours, or a dense model.
        config: Settings.
        native: Whether the native engine is to be used; none takes it where it can run and says
            when it cannot.
        weight_format: How the native engine stores weights; as the checkpoint has them if none.

    Raises:
        InputError: If the model cannot be read, or the native engine was asked for and does not
            take it.
        RunError: If the native engine was asked for and cannot run here.
    """

    def __init__(
        self,
        source: str,
        config: ServeConfig,
        *,
        native: bool | None = None,
        weight_format: Format | None = None,
    ) -> None:
        self.config = config
        self.name = config.name or name_of(source)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(source)
        model = load_any(source)
        embeddings: Any = model.get_input_embeddings()
        self.vocabulary: int = embeddings.weight.shape[0]
        self.length = _length(model, config)
        self.stop = stop_ids(model, self.tokenizer)
        self.share = ActiveShare(model)
        gated = bool(threshold_routers(model)) and all(
            layer.router is None or layer.router in threshold_routers(model)
            for layer in moe_layers(model)
        )
        decoder = self._decoder(source, model, native, weight_format)
        self.curve: OperatingCurve | None = None
        if gated:
            self.curve = measure_curve(
                decoder, self.share, measuring_text(self.tokenizer, self.length)
            )
        self.metrics = Metrics(self.share)
        batch = Batch(decoder, max_rows=config.rows, record=bool(self.share.routed))
        self.worker = Worker(
            batch,
            room=config.slots + config.queue,
            share=self.share,
            observe=self.metrics.observe,
        )
        self.metrics.watch(self.worker)
        self.card = Model(
            id=self.name, created=int(time.time()), object="model", owned_by="moesaic"
        )

    def _decoder(
        self,
        source: str,
        model: PreTrainedModel,
        native: bool | None,
        weight_format: Format | None,
    ) -> Stepper:
        # Whole panels of positions are kept; what was asked for is the bound all the same.
        sizes = {"length": self.length, "slots": self.config.slots}
        if native is False:
            return PlainDecoder(model, **sizes)
        try:
            return Decoder(model, weight_format=weight_format, release=True, **sizes)
        except (InputError, RunError) as error:
            if native or weight_format is not None:
                raise
            logger.warning("decoding with transformers, one sequence at a time: %s", error)
        # Packing gave up weights of the first one.
        return PlainDecoder(load_any(source), **sizes)


def name_of(source: str) -> str:
    """What to call a model: the last part of where it is."""
    return Path(source.removeprefix("package:")).resolve().name


def _length(model: PreTrainedModel, config: ServeConfig) -> int:
    """Positions of a sequence: those asked for, or as many as the model was made for."""
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and most < config.length:
        logger.info("sequences have at most %d tokens, which the model was made for", most)
        return int(most)
    return config.length
