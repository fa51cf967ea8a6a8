"""Train a converted or pruned model: what trains, against what, to which budget; resumable."""

from __future__ import annotations

import json
import shutil
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic._files import read_json, require_space, write_json
from moesaic._progress import SILENT, Progress
from moesaic.data.blocks import TokenBlocks
from moesaic.models.architectures import architecture_of
from moesaic.models.checkpoint import fingerprint
from moesaic.models.ffn import decoder_layers
from moesaic.nn.layer import moe_layers
from moesaic.training.budget import BudgetControl, settle_threshold, sigmoid_routers
from moesaic.training.config import TrainConfig
from moesaic.training.end_step import EndStep
from moesaic.training.health import TrainingHealth
from moesaic.training.teacher import dense_teacher, given_teacher, is_own_teacher
from moesaic.training.trainer import BlockDataset, DistillTrainer, StepRecorder
from moesaic.training.zeros import zeros_kept

METRICS = "metrics.jsonl"
# The last file of a checkpoint to be written.
_WHOLE = "trainer_state.json"
# Blocks of training text on which the final threshold is placed.
_SETTLE_BLOCKS = 12


def train(
    model: PreTrainedModel,
    text: TokenBlocks,
    config: TrainConfig,
    directory: Path,
    progress: Progress = SILENT,
    *,
    teacher: PreTrainedModel | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Train a converted or pruned model on text.

    Run again after an interruption with the same model, text and settings, it goes on from its
    last checkpoint and gives the same losses. Weights that pruning set to zero stay zero; see
    `moesaic.training.zeros`.

    Args:
        model: A model as converted or pruned, be it into an ordinary dense one. One without
            routers, or whose routers always choose as many experts, has no budget: `config.active`
            is 0 then.
        text: Training text; held-out text must not be given.
        config: Settings.
        directory: Where metrics, the history of the experts' health and checkpoints go.
        progress: Told of every token.
        teacher: What it is distilled from, which is frozen. If none, the model's own weights with
            all gates on, which is its dense parent only where every neuron of that is in it.

    Returns:
        The model in evaluation mode and the results: the metrics of each step under `log`.

    Raises:
        InputError: Before any work, if the settings do not fit the model or the directory holds
            another training.
    """
    steps = config.tokens // (config.batch_blocks * text.block)
    if steps < 1:
        raise InputError(
            f"train tokens must be at least one step of {config.batch_blocks * text.block}, got "
            f"{config.tokens}; raise tokens or lower batch_blocks"
        )
    _check(model, config, teacher)
    terms: dict[str, Any] = getattr(model, "loss_terms", {})
    key = {"settings": to_plain(config), "text": text.fingerprint(), "model": fingerprint(model)}
    if teacher is not None:
        key["teacher"] = fingerprint(teacher)
    _claim(directory, key)
    require_space(directory, _checkpoint_bytes(model), what="a training checkpoint")

    select_trainable(model, config.trains)
    if config.needs_teacher:
        teacher = dense_teacher(model) if teacher is None else given_teacher(teacher)
    else:
        teacher = None
    wrapped: nn.Module = _with_adapters(model, config) if config.trains == "lora" else model
    coef = terms["sparsity"].coef if "sparsity" in terms else 0.0
    control = BudgetControl(config.active, coef, config.budget_rate) if config.active > 0 else None
    step_tokens = config.batch_blocks * text.block
    with zeros_kept(model), progress.stage("train", steps * step_tokens, "tokens") as stage:
        recorder = StepRecorder(directory / METRICS, control, stage, step_tokens, coef)
        trainer = DistillTrainer(
            wrapped,
            model,
            teacher,
            config,
            text.domains,
            _arguments(model, config, directory, steps),
            train_dataset=BlockDataset(text),
            callbacks=[recorder, EndStep()],
        )
        recorder.trainer = trainer
        if any(layer.router is not None for layer in moe_layers(model)):
            trainer.add_callback(TrainingHealth(trainer))
        _quiet(trainer)
        last = _last_checkpoint(directory)
        if last is not None and _step_of(Path(last)) >= steps:
            # The Trainer would do one step more.
            trainer.take_up(last)
            recorder.take_up(TrainerState.load_from_json(str(Path(last) / _WHOLE)))
            stage.advance(steps * step_tokens)
        else:
            trainer.train(resume_from_checkpoint=last)
    if config.trains == "lora":
        model = wrapped.merge_and_unload()  # type: ignore[operator]
    model.requires_grad_(True)
    results: dict[str, Any] = {"steps": steps, "tokens": steps * step_tokens}
    if config.active > 0:
        ids_NS = torch.from_numpy(text.take(min(_SETTLE_BLOCKS, len(text))).ids_NS).long()
        results["threshold"] = settle_threshold(model, ids_NS.to(model.device), config.active)
    lines = (directory / METRICS).read_text().splitlines()[:steps]
    results["log"] = [json.loads(line) for line in lines]
    return model.eval(), results


def _check(model: PreTrainedModel, config: TrainConfig, teacher: PreTrainedModel | None) -> None:
    """Refuse what cannot be trained as the settings say."""
    if config.trains == "routers" and all(layer.router is None for layer in moe_layers(model)):
        raise InputError("the model has no routers, and trains is 'routers'; set trains to 'ffn'")
    if config.active > 0:
        if "sparsity" not in getattr(model, "loss_terms", {}):
            raise InputError(
                "a budget needs the sparsity loss; convert with sparse_coef, or active 0"
            )
        sigmoid_routers(model)
    if not config.needs_teacher:
        return
    if teacher is None and not is_own_teacher(model):
        raise InputError(
            "the model lacks weights of its dense parent, so it cannot be its own teacher; give "
            "train the dense parent as teacher, or set distill and match to 0 and language to 1"
        )
    if teacher is model:
        raise InputError("the teacher is the model itself, which would change; load it twice")


def clean(directory: Path) -> None:
    """Delete the checkpoints of a training whose result is saved; its metrics stay."""
    for path in directory.glob("checkpoint-*"):
        # First what makes it count as whole: half a checkpoint must never be resumed from.
        (path / _WHOLE).unlink(missing_ok=True)
        shutil.rmtree(path)


def select_trainable(model: PreTrainedModel, trains: str) -> None:
    """Freeze what does not train."""
    model.requires_grad_(trains == "everything")
    if trains == "ffn" and not moe_layers(model):
        row = architecture_of(model.config.model_type)
        for layer in decoder_layers(model):
            for path in filter(None, (row.gate, row.up, row.down)):
                attrgetter(path)(layer).requires_grad_(True)
    for layer in moe_layers(model):
        for router in layer.routers():
            router.requires_grad_(True)
        if trains == "ffn":
            layer.requires_grad_(True)


def _with_adapters(model: PreTrainedModel, config: TrainConfig) -> Any:
    """Put low-rank adapters on the attention; routers go on training."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(
            "trains 'lora' needs peft, which is not installed; pip install 'moesaic[train]'"
        ) from error
    inside = {id(m) for layer in moe_layers(model) for m in layer.modules()}
    head = model.get_output_embeddings()
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and id(module) not in inside
        and module is not head
    ]
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in targets)
    wrapped = get_peft_model(
        model,
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank,
            target_modules=targets,
            fan_in_fan_out=transposed,
        ),
    )
    for layer in moe_layers(model):
        for router in layer.routers():
            router.requires_grad_(True)
    return wrapped


def _arguments(
    model: PreTrainedModel, config: TrainConfig, directory: Path, steps: int
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=config.batch_blocks // config.accumulate,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(config.warmup * steps),
        max_grad_norm=1.0,
        save_steps=config.checkpoint_every,
        save_total_limit=1,
        logging_strategy="steps" if config.tensorboard else "no",
        logging_steps=1,
        report_to=["tensorboard"] if config.tensorboard else [],
        restore_callback_states_from_checkpoint=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=model.device.type == "cpu",
    )


def _quiet(trainer: DistillTrainer) -> None:
    """Progress has its own reporter; the Trainer prints nothing."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _claim(directory: Path, key: dict[str, Any]) -> None:
    """Make the directory ours, or refuse one that holds another training."""
    path = directory / "train.json"
    if path.is_file():
        old = read_json(path)
        different = [n for n, value in json.loads(json.dumps(key)).items() if old.get(n) != value]
        if different:
            raise InputError(
                f"{directory} holds a training with other {' and '.join(different)}; choose "
                "another directory or delete it"
            )
        return
    write_json(path, key)


def _checkpoint_bytes(model: PreTrainedModel) -> int:
    """Disk for two checkpoints, the newest and the one it replaces: weights and AdamW's moments."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return int(2 * 3 * weights)


def _last_checkpoint(directory: Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    whole = [path for path in directory.glob("checkpoint-*") if _is_whole(path)]
    if not whole:
        return None
    return str(max(whole, key=_step_of))


def _is_whole(checkpoint: Path) -> bool:
    """Whether its last file is there to the last brace; a killed run may leave an empty one."""
    try:
        return isinstance(json.loads((checkpoint / _WHOLE).read_text("utf-8")), dict)
    except (OSError, ValueError):
        return False


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
