import builtins
import json

import pytest
import torch
from evaluation_cases import dense_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moesaic._errors import InputError
from moesaic.evaluation import TaskAccuracy, TasksConfig, evaluate_tasks
from moesaic.evaluation.tasks import read_questions

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "red", "green", "blue", "what", "is", "next", "?"]


@pytest.fixture
def words_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return str(path)


def question(answer, choices=("red", "green", "blue")):
    return {"question": "what is next ?", "choices": list(choices), "answer": answer}


def log_likelihoods(model, tokenizer, choices):
    scores = []
    for choice in choices:
        context = tokenizer("what is next ?")["input_ids"]
        ids = torch.tensor([context + tokenizer(choice)["input_ids"]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
        scores.append(sum(logs[i - 1, ids[0, i]] for i in range(len(context), ids.shape[1])).item())
    return scores


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_accuracy_is_that_of_the_likelihoods(tmp_path, words_tokenizer):
    pytest.importorskip("lm_eval")
    model = dense_model().train()
    model.eval().lm_head.train()
    scores = log_likelihoods(model, words_tokenizer, ["red", "green", "blue"])
    best = scores.index(max(scores))
    # Three of the four questions have the model's own answer.
    lines = [question(best)] * 3 + [question((best + 1) % 3)]
    path = write(tmp_path / "colours.jsonl", *lines)
    before = torch.random.get_rng_state()
    result = evaluate_tasks(model, words_tokenizer, [path], TasksConfig(batch_size=2))[path]
    assert result.metrics["acc"] == 0.75
    assert result.questions == 4
    assert result.metrics["acc_stderr"] > 0
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.lm_head.training
    assert not model.training
    limited = evaluate_tasks(model, words_tokenizer, [path], TasksConfig(limit=2, num_fewshot=1))
    assert limited[path].questions == 2
    with pytest.raises(InputError, match="task 'arc_eazy' is neither a task of lm-eval nor a"):
        evaluate_tasks(model, words_tokenizer, ["arc_eazy"])


def test_missing_library_names_the_extra(tmp_path, monkeypatch, words_tokenizer):
    real = builtins.__import__

    def refuse(name, *args, **options):
        if name.partition(".")[0] == "lm_eval":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    path = write(tmp_path / "a.jsonl", question(0))
    with pytest.raises(ImportError, match=r'not installed; pip install "moesaic\[eval\]"'):
        evaluate_tasks(dense_model(), words_tokenizer, [path])


def test_questions_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, {**question(1), "note": "ignored"})
    path.write_text(path.read_text("utf-8") + "\n", "utf-8")
    assert read_questions(path) == [question(1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2, is not JSON"),
        ('["a"]', "line 2, must have 'question', 'choices' and 'answer'; add what is missing"),
        ('{"question": "a", "choices": ["b", "c"]}', "line 2, must have 'question', 'choices' and"),
        (json.dumps({**question(0), "question": ""}), "line 2, must have a text as 'question'"),
        (json.dumps(question(0, ["a"])), r"line 2, must have 2 or more texts .* got \['a'\]; add"),
        (json.dumps(question(0, ["a", 3])), "line 2, must have 2 or more texts as 'choices'"),
        (json.dumps(question(3)), r"line 2, must have an index in \[0, 2\] as 'answer', got 3"),
        (json.dumps(question(True)), "as 'answer', got True; correct it"),
    ],
)
def test_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(question(0)) + "\n" + line + "\n", "utf-8")
    with pytest.raises(InputError, match=message):
        read_questions(path)


def test_missing_or_empty_file_is_refused(tmp_path, words_tokenizer, dense):
    with pytest.raises(InputError, match=r"task file .* does not exist; check the path"):
        evaluate_tasks(dense, words_tokenizer, [str(tmp_path / "none.jsonl")])
    (tmp_path / "empty.jsonl").write_text("\n", "utf-8")
    with pytest.raises(InputError, match="holds 0 questions, at least 1 is needed; add some"):
        evaluate_tasks(dense, words_tokenizer, [str(tmp_path / "empty.jsonl")])
    with pytest.raises(InputError, match="needs at least 1 task, got 0; name one or give"):
        evaluate_tasks(dense, words_tokenizer, [])
    with pytest.raises(InputError, match="limit must be at least 0, got -1; raise it"):
        TasksConfig(limit=-1)


def test_the_interval_is_wilsons():
    # (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with z = 1.96.
    for right, questions, low, high in ((5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775)):
        found = TaskAccuracy(metrics={"acc": right / questions}, questions=questions)
        assert found.interval() == pytest.approx((low, high), abs=1e-4)
