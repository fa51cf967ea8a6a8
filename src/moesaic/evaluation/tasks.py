"""Accuracy on tasks, through lm-eval: its own tasks by name, or local files of questions.

Source: the Language Model Evaluation Harness (lm-eval); a choice is scored by the likelihood of
its text after the question, in total (`accuracy`) and per byte (`accuracy_normalized`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic._errors import InputError
from moesaic.evaluation._mode import measuring


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksConfig:
    """Settings of the measurement of accuracy.

    Attributes:
        limit: At most so many questions of each task; 0 for all.
        num_fewshot: Solved questions shown before each, from the same file for a local one.
        batch_size: Choices scored at a time.
        seed: Of the choice of the questions shown.
    """

    limit: int = 0
    num_fewshot: int = 0
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("limit", 0), ("num_fewshot", 0), ("batch_size", 1)):
            if getattr(self, name) < low:
                raise InputError(
                    f"{name} must be at least {low}, got {getattr(self, name)}; raise it"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskAccuracy:
    """Accuracy on one task.

    Attributes:
        metrics: Every metric of the task, in [0, 1] where it is an accuracy. Local files have
            `acc` and `acc_norm`, and the standard errors `acc_stderr` and `acc_norm_stderr`.
        questions: How many were asked.
    """

    metrics: Mapping[str, float]
    questions: int

    def interval(self) -> tuple[float, float]:
        """Ends of the 95% interval of `acc`, over questions.

        Wilson's (Journal of the American Statistical Association 22, 1927): of use for few
        questions and near 0 and 1 too, where the standard error is 0.
        """
        from scipy.stats import binomtest

        right = round(self.metrics["acc"] * self.questions)
        ends = binomtest(right, self.questions).proportion_ci(0.95, method="wilson")
        return float(ends.low), float(ends.high)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    config: TasksConfig | None = None,
) -> dict[str, TaskAccuracy]:
    """Measure accuracy on tasks.

    Args:
        model: Dense or converted, in memory.
        tokenizer: Of the model.
        tasks: Names of lm-eval tasks, which fetch their data, or paths of `.jsonl` files, which
            need no network: per line `question`, a list of `choices`, and `answer`, the index of
            the right one.
        config: Settings.

    Returns:
        By the name of the task, or the path as given.

    Raises:
        InputError: If a file is missing or a line of it is not such a question, or a name is
            unknown.
        ImportError: If lm-eval is not installed.
    """
    config = config or TasksConfig()
    local, manager = check_tasks(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    names = {task: f"local-{i}-{Path(task).stem}" for i, task in enumerate(local)}
    specs = [_local_task(names[t], local[t], config) if t in local else t for t in tasks]
    with measuring(model):
        results = simple_evaluate(
            model=HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=config.batch_size,
                device=str(model.device),
            ),
            tasks=specs,
            task_manager=manager,
            num_fewshot=config.num_fewshot or None,
            limit=config.limit or None,
            bootstrap_iters=1000,
            log_samples=False,
            # Nothing else is drawn, and the generators of the process stay as they are.
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            fewshot_random_seed=config.seed,
        )
    return {
        task: TaskAccuracy(
            metrics=_metrics(results["results"][names.get(task, task)]),
            questions=int(results["n-samples"][names.get(task, task)]["effective"]),
        )
        for task in tasks
    }


def check_tasks(tasks: Sequence[str]) -> tuple[dict[str, list[dict[str, Any]]], Any]:
    """Refuse tasks that cannot be measured, before a model is loaded; see `evaluate_tasks`.

    Returns:
        The questions of local files, and the task manager of lm-eval.

    Raises:
        InputError: If a file is missing or a line of it is not such a question, or a name is
            unknown.
        ImportError: If lm-eval is not installed.
    """
    if not tasks:
        raise InputError("accuracy needs at least 1 task, got 0; name one or give a .jsonl file")
    local = {task: read_questions(Path(task)) for task in tasks if task.endswith(".jsonl")}
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            'task accuracy needs lm-eval, which is not installed; pip install "moesaic[eval]"'
        ) from error
    # Its own tasks are a long list to index.
    manager = TaskManager(include_defaults=len(local) < len(set(tasks)))
    for task in tasks:
        if task not in local and task not in manager.all_tasks:
            raise InputError(
                f"task {task!r} is neither a task of lm-eval nor a .jsonl file; "
                "`lm_eval ls tasks` lists the names"
            )
    return local, manager


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Read a file of multiple-choice questions and check every line.

    Raises:
        InputError: Naming the file and the line that is wrong.
    """
    if not path.is_file():
        raise InputError(f"task file {path} does not exist; check the path")
    questions = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}, is not JSON ({error}); correct it") from error
        questions.append(_checked(entry, f"{path}, line {number},"))
    if not questions:
        raise InputError(f"task file {path} holds 0 questions, at least 1 is needed; add some")
    return questions


def _checked(entry: Any, where: str) -> dict[str, Any]:
    """Keep the fields of a question, all of the right kind."""
    if not isinstance(entry, dict) or not {"question", "choices", "answer"} <= entry.keys():
        raise InputError(
            f"{where} must have 'question', 'choices' and 'answer'; add what is missing"
        )
    question, choices, answer = entry["question"], entry["choices"], entry["answer"]
    if not isinstance(question, str) or not question:
        raise InputError(f"{where} must have a text as 'question', got {question!r}; correct it")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise InputError(
            f"{where} must have 2 or more texts as 'choices', got {choices!r}; add some"
        )
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise InputError(
            f"{where} must have an index in [0, {len(choices) - 1}] as 'answer', got {answer!r}; "
            "correct it"
        )
    return {"question": question, "choices": choices, "answer": answer}


def _local_task(name: str, questions: list[dict[str, Any]], config: TasksConfig) -> dict[str, Any]:
    """Describe a file of questions as lm-eval describes its own tasks."""
    import datasets

    def load(**_: Any) -> dict[str, Any]:
        return {"test": datasets.Dataset.from_list(questions)}

    return {
        "task": name,
        "custom_dataset": load,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "num_fewshot": config.num_fewshot,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
    }


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """Keep the numbers; lm-eval adds the name of a filter to each metric."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in result.items()
        if isinstance(value, (int, float)) and "," in key
    }
