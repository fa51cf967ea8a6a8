"""What all cells of a comparison share, made once and kept: parent, text, statistics, questions.

The statistics are measured in one pass with the collectors of all methods whose cells are to be
done. A collector holds memory for one layer at a time, and the pass holds those of all of them: if
that is too much, do one method after the other with `only`, whose pass then has its collectors
alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic._errors import InputError
from moesaic._files import atomic_directory, read_json, write_json
from moesaic._progress import SILENT, Progress
from moesaic.calibration import CalibrationStats, calibrate
from moesaic.calibration.stats import MANIFEST, open_stats
from moesaic.data import DataSplit, prepare
from moesaic.evaluation import (
    QualityResult,
    build_tasks,
    choose_blocks,
    evaluate_perplexity,
    evaluate_tasks,
)
from moesaic.evaluation.intervals import BlockLosses
from moesaic.evaluation.machine import machine_info
from moesaic.evaluation.record import cost_section, quality_section
from moesaic.models.architectures import architecture_of
from moesaic.models.checkpoint import load_tokenizer
from moesaic.models.ffn import decoder_layers, read_ffn
from moesaic.nn.layer import moe_layers
from moesaic.recipes.comparison.protocol import Protocol
from moesaic.recipes.parent import keep_parent, open_parent


def ffn_weights(model: PreTrainedModel) -> int:
    """Weights of the matrices of a dense model's feed-forward networks."""
    row = architecture_of(model.config.model_type)
    activation = getattr(model.config, row.activation)
    total = 0
    for layer in decoder_layers(model):
        ffn = read_ffn(layer, row, activation)
        total += sum(w.numel() for w in (ffn.gate_FD, ffn.up_FD, ffn.down_DF) if w is not None)
    return total


class Shared:
    """What all cells share, in the directory of a comparison.

    Args:
        protocol: What is compared.
        directory: Of its results.
        progress: Told of every stage.
    """

    def __init__(self, protocol: Protocol, directory: Path, progress: Progress = SILENT) -> None:
        self.protocol = protocol
        self.directory = directory
        self.progress = progress
        self.parent = directory / "parent"
        self.record_file = directory / "dense.json"

    def make(self, collectors: Iterable[str]) -> None:
        """Make what is not there yet.

        Raises:
            InputError: If the model or the text does not fit the protocol.
        """
        protocol, text = self.protocol, self.directory / "text"
        if not text.is_dir():
            split = prepare(protocol.data, load_tokenizer(protocol.model), progress=self.progress)
            self._check_length(split)
            split.save(text)
        keep_parent(protocol.model, protocol.dtype, self.parent, self.progress)
        if protocol.questions.per_domain and not (self.directory / "questions").is_dir():
            with atomic_directory(self.directory / "questions") as temporary:
                build_tasks(
                    self.split.heldout,
                    self.split.train,
                    self.tokenizer(),
                    temporary,
                    protocol.questions,
                )
        if not self.record_file.is_file():
            self._measure_dense()
        needed = tuple(sorted(set(collectors)))
        if needed and self._stats_of(needed) is None:
            calibrate(
                self.dense(),
                self.split.train,
                needed,
                protocol.calibration,
                self.directory / "calibration" / "+".join(needed),
                self.progress,
            )

    def _check_length(self, split: DataSplit) -> None:
        """Refuse, before a model is loaded, to calibrate on more text than there is."""
        tokens = self.protocol.calibration.tokens
        if tokens > split.train.num_tokens:
            raise InputError(
                f"calibration.tokens is {tokens}, the text has {split.train.num_tokens}; lower it, "
                "raise data.max_tokens_per_domain or give more text"
            )

    @cached_property
    def split(self) -> DataSplit:
        """The text, training and held-out."""
        return DataSplit.load(self.directory / "text")

    @cached_property
    def block_N(self) -> NDArray[np.int64]:
        """Numbers of the held-out blocks that every model reads."""
        heldout = self.protocol.heldout
        return choose_blocks(self.split.heldout, heldout.blocks_per_domain, heldout.seed)

    def dense(self) -> PreTrainedModel:
        """The dense parent, loaded anew."""
        return open_parent(self.parent)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return load_tokenizer(str(self.parent))

    def ask(self, model: PreTrainedModel) -> dict[str, dict[str, float]]:
        """Ask a model the questions; nothing if there are none.

        Returns:
            By file, the metrics of lm-eval, the ends `acc_low` and `acc_high` of the 95% interval
            of its `acc`, and how many `questions` there were.
        """
        files = sorted((self.directory / "questions").glob("*.jsonl"))
        if not files:
            return {}
        found = evaluate_tasks(model, self.tokenizer(), [str(file) for file in files])
        scores = {}
        for name, task in found.items():
            low, high = task.interval()
            more = {"acc_low": low, "acc_high": high, "questions": task.questions}
            scores[Path(name).stem] = {**task.metrics, **more}
        return scores

    def stats(self, collectors: tuple[str, ...]) -> CalibrationStats | None:
        """Statistics that hold some collectors; none if none is needed."""
        if not collectors:
            return None
        place = self._stats_of(collectors)
        assert place is not None, "made for every cell that is to be done"
        return open_stats(place)

    def _stats_of(self, collectors: tuple[str, ...]) -> Path | None:
        """The smallest finished pass that has these collectors."""
        found = [
            path.parent
            for path in (self.directory / "calibration").glob(f"*/{MANIFEST}")
            if set(collectors) <= set(path.parent.name.split("+"))
        ]
        return min(found, key=lambda path: (len(path.name), path.name), default=None)

    def _measure_dense(self) -> None:
        """Read the held-out text with the parent and keep what it lost on every block."""
        model, heldout = self.dense(), self.split.heldout
        quality = self.protocol.heldout.quality
        result = evaluate_perplexity(
            model, heldout, quality, self.progress, block_N=self.block_N, name="dense"
        )
        write_json(
            self.record_file,
            {
                "quality": quality_section(result, result.losses, quality),
                "cost": cost_section(model, result, heldout.block),
                "ffn_weights": ffn_weights(model),
                "accuracy": self.ask(model),
                "machine": machine_info(str(model.dtype).removeprefix("torch.")),
                "losses": result.losses.to_plain(),
            },
        )

    def cost(
        self, model: PreTrainedModel, quality: QualityResult, active: float | None = None
    ) -> dict[str, Any]:
        """What a model costs, its active fraction of the parent's weights.

        Args:
            model: What was measured. It may have been made into a narrower dense one, whose own
                config knows no parent.
            quality: Of the model.
            active: What is active of the model's networks, where its layers do not show it.
        """
        cost = cost_section(model, quality, self.split.heldout.block)
        if not moe_layers(model):
            dense: int = read_json(self.record_file)["ffn_weights"]
            own = ffn_weights(model)
            used = own if active is None else round(active * own)
            cost["active_ffn_fraction"] = used / dense
            cost["active_parameters"] -= own - used
            cost["flops_per_token"] -= 2 * (own - used)
        return cost

    def dense_losses(self) -> BlockLosses:
        """What the parent lost on every block."""
        return BlockLosses.from_plain(read_json(self.record_file)["losses"])
