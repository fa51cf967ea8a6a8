"""The HF Trainer with distillation, budget control and a record of what routers do.

Shapes: B sequences, S positions, T = B * S tokens, V vocabulary.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from moesaic._files import atomic_write
from moesaic._progress import Stage
from moesaic.data.blocks import TokenBlocks
from moesaic.models.ffn import dense_ffn_width
from moesaic.nn.groups import parameter_groups
from moesaic.nn.layer import moe_layers, record_routing
from moesaic.nn.shape import layer_shapes
from moesaic.training.budget import BudgetControl, active_fraction
from moesaic.training.config import TrainConfig
from moesaic.training.divergence import divergence, mismatch
from moesaic.training.teacher import ask_teacher

# Beside the adapters of a checkpoint.
ROUTERS = "routers.safetensors"


class BlockDataset(Dataset[dict[str, Tensor]]):
    """Blocks of text as the Trainer wants them."""

    def __init__(self, blocks: TokenBlocks) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_S = torch.from_numpy(self.blocks.ids_NS[index]).long()
        domain = torch.tensor(int(self.blocks.domain_N[index]))
        return {"input_ids": ids_S, "labels": ids_S, "domain": domain}


class DistillTrainer(Trainer):
    """Trains a converted or pruned model against its dense parent.

    Args:
        model: The model, possibly with adapters.
        core: The converted or pruned model itself, inside `model`.
        teacher: Its dense parent, or none without distillation.
        config: Settings.
        domains: Names of the domains of the text.
        args: Arguments of the Trainer.
        options: The rest.
    """

    def __init__(
        self,
        model: Any,
        core: PreTrainedModel,
        teacher: PreTrainedModel | None,
        config: TrainConfig,
        domains: tuple[str, ...],
        args: TrainingArguments,
        **options: Any,
    ) -> None:
        super().__init__(model=model, args=args, **options)
        self.core: Any = core
        self.teacher = teacher
        self.settings = config
        self.domains = domains
        self.shapes = [
            shape for shape in layer_shapes(core, dense_ffn_width(core.config)) if shape.num_experts
        ]
        # Sums of the current step, over its forward passes.
        self.step_sums: dict[str, Any] = {}
        # The losses here are means over a forward pass, which the Trainer then averages.
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with rates of their own for routers and what parts want faster."""
        if self.optimizer is None:
            assert self.model is not None
            groups = parameter_groups(
                self.model, self.settings.learning_rate, self.settings.router_learning_rate
            )
            self.optimizer = torch.optim.AdamW(
                groups,
                betas=(0.9, 0.95),
                weight_decay=0.0,
                fused=True,
            )
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.model is not self.core:
            # A checkpoint of adapters holds nothing else that trains.
            folder = Path(output_dir or str(self.args.output_dir))
            save_file(self._routers(), folder / ROUTERS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.model is not self.core:
            saved = load_file(Path(resume_from_checkpoint) / ROUTERS)
            with torch.no_grad():
                for name, tensor in self._routers().items():
                    tensor.copy_(saved[name])

    def take_up(self, checkpoint: str) -> None:
        """Load the weights of a checkpoint, as for one after the last step."""
        self._load_from_checkpoint(checkpoint)

    def _routers(self) -> dict[str, Tensor]:
        return {
            f"{index}.{turn}.{name}": tensor
            for index, layer in enumerate(moe_layers(self.core))
            for turn, router in enumerate(layer.routers())
            for name, tensor in router.state_dict().items()
        }

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Sum the divergence from the parent, the language model loss and the routing losses."""
        domain_B = inputs.pop("domain")
        labels_BS = inputs.pop("labels")
        config = self.settings
        forward = model if moe_layers(self.core) else partial(_without_routers, model)
        with record_routing(model) as routings, self._precision():
            out = forward(
                **inputs,
                labels=labels_BS if config.language > 0 else None,
                output_router_logits=True,
                output_hidden_states=config.match > 0,
                use_cache=False,
            )
        # A model without routers has none.
        aux = getattr(out, "aux_loss", None)
        if aux is None:
            aux = torch.zeros((), device=out.logits.device)
        loss = aux
        parts: dict[str, float] = {"aux": float(aux.detach())}
        if config.language > 0:
            language = out.loss - aux
            loss = loss + config.language * language
            parts["language"] = float(language.detach())
        if self.teacher is not None:
            with self._precision():
                parent = ask_teacher(self.teacher, hidden=config.match > 0, **inputs)
            if config.distill > 0:
                kl = divergence(out.logits.flatten(0, 1), parent.logits.flatten(0, 1))
                loss = loss + config.distill * kl
                parts["kl"] = float(kl.detach())
            if config.match > 0:
                gap = mismatch(out.hidden_states[1:], parent.hidden_states[1:])
                loss = loss + config.match * gap
                parts["match"] = float(gap.detach())
        self._note(parts, routings, domain_B, inputs["input_ids"])
        return (loss, out) if return_outputs else loss

    def _precision(self) -> AbstractContextManager[object]:
        """Compute products as the settings say."""
        if self.settings.mixed_precision == "none":
            return nullcontext()
        return torch.autocast(self.core.device.type, getattr(torch, self.settings.mixed_precision))

    def _note(
        self, parts: dict[str, float], routings: list[Any], domain_B: Tensor, ids_BS: Tensor
    ) -> None:
        """Add a forward pass to the sums of its step."""
        sums = self.step_sums
        sums["passes"] = sums.get("passes", 0) + 1
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value
        domain_T = domain_B.repeat_interleave(ids_BS.shape[1])
        with torch.no_grad():
            layers = active_fraction(routings, self.shapes)
            previous = sums.get("layers", [0.0] * len(layers))
            sums["layers"] = [a + b for a, b in zip(previous, layers, strict=True)]
            by_domain = sums.setdefault("domains", {})
            for domain in domain_B.unique().tolist():
                mean = _mean(active_fraction(routings, self.shapes, domain_T == domain))
                total, count = by_domain.get(domain, (0.0, 0))
                by_domain[domain] = (total + mean, count + 1)


def _without_routers(model: Any, *, output_router_logits: bool, **inputs: Any) -> Any:
    """Run an ordinary dense model, which has no router logits to give."""
    return model(**inputs)


def _mean(fractions: list[float]) -> float:
    """Mean over layers; without routers all that is there is on."""
    return sum(fractions) / len(fractions) if fractions else 1.0


class StepRecorder(TrainerCallback, ExportableState):
    """After each step: writes one line of metrics and lets the budget control act.

    Its state is part of every checkpoint, so that a resumed run goes on exactly.

    Args:
        path: File of JSON lines.
        control: Budget control, or none.
        stage: Progress in tokens.
        step_tokens: Tokens of a step.
    """

    def __init__(
        self,
        path: Path,
        control: BudgetControl | None,
        stage: Stage,
        step_tokens: int,
        coef: float = 0.0,
    ) -> None:
        self.path = path
        self.control = control
        self.stage = stage
        self.step_tokens = step_tokens
        self.coef = coef
        self.trainer: DistillTrainer | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        integral = 0.0 if self.control is None else self.control.integral
        return {"args": {}, "attributes": {"coef": self.coef, "integral": integral}}

    def take_up(self, state: TrainerState) -> None:
        """Set the coefficient and its control to what a checkpoint kept, if there is one."""
        callbacks: Any = state.stateful_callbacks
        saved = callbacks.get("StepRecorder") if state.global_step else None
        if isinstance(saved, dict):
            self.coef = saved["attributes"]["coef"]
            if self.control is not None:
                self.control.integral = saved["attributes"]["integral"]
                self._set_coef()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the state of the checkpoint and drop the metrics written after it."""
        self.take_up(state)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        # One line a step, from the first; what follows, perhaps cut in a line, is done again.
        kept = lines[: state.global_step]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept))
        self.stage.advance(state.global_step * self.step_tokens)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the step and set the next coefficient."""
        assert self.trainer is not None
        sums = self.trainer.step_sums
        passes = sums.pop("passes")
        layers = [value / passes for value in sums.pop("layers")]
        domains = sums.pop("domains")
        active = _mean(layers)
        line: dict[str, Any] = {
            "step": state.global_step,
            "tokens": state.global_step * self.step_tokens,
            **{name: value / passes for name, value in sums.items()},
            "active": active,
            "sparse_coef": self.coef,
            "active_per_layer": [round(value, 4) for value in layers],
            "active_per_domain": {
                self.trainer.domains[d]: round(total / count, 4)
                for d, (total, count) in domains.items()
            },
        }
        line["loss"] = line["aux"] + sum(
            weight * line.get(name, 0.0)
            for name, weight in (
                ("kl", self.trainer.settings.distill),
                ("match", self.trainer.settings.match),
                ("language", self.trainer.settings.language),
            )
        )
        sums.clear()
        with self.path.open("a") as handle:
            handle.write(json.dumps(line) + "\n")
        if self.control is not None:
            self.coef = self.control.update(active)
            self._set_coef()
        self.stage.advance(self.step_tokens)

    def _set_coef(self) -> None:
        assert self.trainer is not None
        self.trainer.core.set_loss_coef("sparsity", self.coef)
