import dataclasses
import json

import pytest
from evaluation_cases import POSITIONS, Letters, convert, dense_model, make_blocks

from moesaic._config import build_config, to_plain
from moesaic._errors import InputError
from moesaic.analysis import render_report, summary_rows
from moesaic.evaluation import EvaluationConfig, QualityConfig, SpeedConfig, Subject, evaluate
from moesaic.evaluation.record import SCHEMA

QUICK = EvaluationConfig(
    blocks_per_domain=4,
    quality=QualityConfig(resamples=200),
    thresholds=(0.25, 0.75),
    curve_blocks_per_domain=2,
    speed=SpeedConfig(prefill_tokens=8, prompt_tokens=4, decode_tokens=2, repeats=2, warmup=0),
    example_tokens=9,
    prompts=("ab", "cde"),
    generate_tokens=4,
)


@pytest.fixture(scope="module")
def record():
    subjects = {
        "flap": Subject(convert(dense_model(), experts=0, shared=18), "static-pruning", "runs/p"),
        "parent": Subject(dense_model(), "dense", "models/d"),
        "mosaic": Subject(convert(dense_model()), "dsmoe", "runs/m"),
    }
    blocks = make_blocks({"docs": [1, 2, 1, 3], "code": [2, 1, 2]})
    training = [{"step": 1, "loss": 2.5}]
    return evaluate(
        subjects, blocks, Letters(), QUICK, training=training, manifest={"schema": 1, "steps": []}
    )


def test_record_survives_json(record):
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_record_is_complete(record):
    assert record["schema"] == SCHEMA
    assert record["created"].endswith("+00:00")
    assert {"cpu", "cores", "torch", "transformers", "dtype"} <= record["machine"].keys()
    docs = record["data"]["domains"]["docs"]
    assert (record["data"]["block"], docs["tokens"], docs["documents"]) == (17, 4 * 17, 4)
    assert docs["sources"][0]["licence"] == "CC0-1.0"
    assert [(m["name"], m["kind"], m["path"]) for m in record["models"]] == [
        ("flap", "static-pruning", "runs/p"),
        ("parent", "dense", "models/d"),
        ("mosaic", "dsmoe", "runs/m"),
    ]
    for model in record["models"]:
        assert set(model["quality"]["domains"]) == {"docs", "code"}
        for quality in model["quality"]["domains"].values():
            assert quality["low"] <= quality["perplexity"] <= quality["high"]
            assert quality["tokens"] == 4 * 16
        assert model["quality"]["ratio_low"] <= model["quality"]["ratio"]
        assert model["quality"]["ratio"] <= model["quality"]["ratio_high"]
        assert {
            "active_ffn_fraction",
            "active_parameters",
            "router_parameters",
            "total_parameters",
            "flops_per_token",
            "bytes",
        } <= model["cost"].keys()
        for phase in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            rate = model["speed"][phase]
            assert 0 < rate["low"] <= rate["median"] <= rate["high"]
    assert record["training"] == [{"step": 1, "loss": 2.5}]
    assert record["manifest"] == {"schema": 1, "steps": []}


def test_parent_is_the_unit(record):
    parent = record["models"][1]
    assert [parent["quality"][k] for k in ("ratio", "ratio_low", "ratio_high")] == [1.0] * 3
    assert parent["cost"]["active_ffn_fraction"] == 1.0
    assert record["models"][0]["cost"]["active_ffn_fraction"] == 0.75


def test_sections_of_the_main_model(record):
    mosaic = record["models"][2]
    activation = record["activation"]
    assert [len(layer) for layer in activation["experts_per_layer"]] == [4, 4]
    mean = sum(activation["mean_per_layer"]) / 2
    assert mosaic["cost"]["active_ffn_fraction"] == pytest.approx(mean)
    assert set(activation["per_domain"]) == {"docs", "code"}
    low, high = record["curve"]
    assert (low["threshold"], high["threshold"]) == (0.25, 0.75)
    assert low["active_ffn_fraction"] > high["active_ffn_fraction"]
    assert set(low["domains"]) == {"docs", "code"}
    assert [e["domain"] for e in record["examples"]] == ["docs", "code"]
    assert all(len(e["tokens"]) == 9 for e in record["examples"])
    assert all(0 <= t["active"] <= 1 for e in record["examples"] for t in e["tokens"])
    assert [g["prompt"] for g in record["generations"]] == ["ab", "cde"]
    assert all(set(g["texts"]) == {"flap", "parent", "mosaic"} for g in record["generations"])


def test_report_reads_it(record):
    assert [row["model"] for row in summary_rows(record)] == ["flap", "parent", "mosaic"]
    assert "mosaic" in render_report(record)


def test_parts_that_do_not_apply_are_empty(blocks):
    config = EvaluationConfig(
        quality=QualityConfig(resamples=100), measure_speed=False, generate_tokens=0
    )
    alone = evaluate({"parent": Subject(dense_model(), "dense")}, blocks, Letters(), config)
    assert "speed" not in alone["models"][0]
    assert (alone["curve"], alone["activation"], alone["examples"]) == ([], {}, [])
    assert alone["generations"] == []
    topk = Subject(convert(dense_model(), router="topk-softmax"), "upcycled")
    both = evaluate(
        {"parent": Subject(dense_model(), "dense"), "topk": topk}, blocks, Letters(), config
    )
    assert both["curve"] == []
    assert both["activation"]["mean_per_layer"] == [0.5, 0.5]


def test_exactly_one_parent(blocks):
    parent = Subject(dense_model(), "dense")
    message = "exactly 1 model of kind 'dense', got {} among {}; give the parent"
    for models in ({}, {"a": parent, "b": parent}, {"m": Subject(dense_model(), "dsmoe")}):
        count = sum(s.kind == "dense" for s in models.values())
        with pytest.raises(InputError, match=message.format(count, len(models))):
            evaluate(models, blocks, Letters(), QUICK)


def test_another_tokenizer_is_said(caplog, blocks, monkeypatch):
    monkeypatch.setattr(
        "moesaic.evaluation.record.tokenizer_fingerprint", lambda tokenizer: "other"
    )
    config = dataclasses.replace(QUICK, measure_speed=False, thresholds=())
    packed = dataclasses.replace(blocks, tokenizer="first")
    evaluate({"parent": Subject(dense_model(), "dense")}, packed, Letters(), config)
    assert "packed with another tokenizer than the one given" in caplog.text


def test_single_document_is_said_once(caplog):
    config = dataclasses.replace(QUICK, measure_speed=False, thresholds=())
    blocks = make_blocks({"docs": [3], "code": [2, 1]})
    subjects = {"d": Subject(dense_model(), "dense"), "m": Subject(convert(dense_model()), "dsmoe")}
    evaluate(subjects, blocks, Letters(), config)
    message = "domain docs is from one document, so its interval is over blocks and too narrow"
    assert caplog.text.count(message) == 1
    assert caplog.text.count("is from one document") == 1


def test_config_is_plain_data():
    assert build_config(EvaluationConfig, to_plain(QUICK), where="evaluation") == QUICK


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks_per_domain": 0}, "blocks_per_domain must be at least 1, got 0; raise it"),
        ({"examples_per_domain": -1}, "examples_per_domain must be at least 0, got -1"),
        ({"example_tokens": 0}, "example_tokens must be at least 1, got 0"),
        ({"thresholds": (0.5, 1.0)}, r"threshold must be in \[0, 1\), got 1.0"),
        ({"prompts": ("a", "")}, "prompts must not be empty texts; remove the empty one"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(InputError, match=message):
        EvaluationConfig(**options)


def test_speed_that_does_not_fit_is_refused_before_work(blocks, monkeypatch):
    def stop(*args, **options):
        raise AssertionError("text was read before the check")

    monkeypatch.setattr("moesaic.evaluation.record.evaluate_perplexity", stop)
    with pytest.raises(InputError, match=f"at most the {POSITIONS} positions of parent, got 512"):
        evaluate({"parent": Subject(dense_model(), "dense")}, blocks, Letters())
