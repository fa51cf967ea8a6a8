"""A server beside its engine: the same texts or no speed, ratios, refusals, the whole command."""

import json
import sys

import pytest
from model_cases import Case, converted
from recipe_cases import byte_tokenizer, write_text
from serving_cases import running
from test_house import hooks

from moesaic._errors import InputError, RunError
from moesaic.cli.main import main
from moesaic.evaluation.bench.serve.bench import (
    IN_PROCESS,
    SERVER,
    VLLM,
    ServeBenchConfig,
    full_prompts,
    rows_of,
    same_texts,
)
from moesaic.evaluation.bench.serve.ways import Answer, InProcess, OverHttp, Way
from moesaic.inference.plain_decoder import PlainDecoder
from moesaic.models.checkpoint import load, new_manifest, save
from moesaic.ops.cpu import library
from moesaic.serving.vllm import process

needs_engine = pytest.mark.skipif(bool(library.why_not()), reason="native code cannot run here")


class Canned(Way):
    """Answers as told; what it was asked is kept."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def ask(self, prompts):
        self.asked.append([list(ids) for ids in prompts])
        return [self.answer(ids, len(prompts)) for ids in prompts]

    def close(self):
        pass


def count_up(ids, together):
    """Text and tokens that tell the prompt; the first comes later the more are asked."""
    return Answer(f"after {ids[0]}", 4, 0.1 * together)


def test_prompts_with_short_answers_are_left_out():
    way = Canned(lambda ids, _: Answer("", ids[0], 0.0))
    starts = [[4], [3], [4], [5], [4], [4]]
    assert full_prompts(way, starts, 2, 4) == [[4], [4]]
    # Two at a time, and no further than needed.
    assert way.asked == [[[4], [3]], [[4], [5]]]
    with pytest.raises(InputError, match="5 prompts with answers of 4 tokens are needed, and of 6"):
        full_prompts(way, starts, 5, 4)


def test_texts_are_compared_alone_and_together():
    prompts = [[1], [2]]
    want = [count_up(ids, 1) for ids in prompts]
    assert same_texts(Canned(count_up), prompts, want) == 1.0
    # Wrong for one of two, but only together: one of four answers.
    mixed = Canned(lambda ids, n: count_up([1] if n == 2 else ids, n))
    assert same_texts(mixed, prompts, want) == 0.75
    shorter = Canned(lambda ids, n: count_up(ids, n)._replace(num_tokens=3))
    assert same_texts(shorter, prompts, want) == 0.0


def test_rows_hold_rates_ratios_and_first_tokens():
    ways = {name: Canned(count_up) for name in (IN_PROCESS, SERVER)}
    config = ServeBenchConfig(requests=2, seconds=0.01)
    engine, server = rows_of(ways, [[1], [2]], config)
    assert (engine["way"], server["way"]) == (IN_PROCESS, SERVER)
    for row in (engine, server):
        assert row["same_as_engine"] == 1.0
        assert list(row["requests"]) == ["1", "2"]
        for count, found in row["requests"].items():
            assert found["first_p50_s"] == found["first_p95_s"] == pytest.approx(0.1 * int(count))
            assert found["low"] <= found["tokens_per_s"] <= found["high"]
            rate = engine["requests"][count]["tokens_per_s"]
            assert found["of_engine"] == found["tokens_per_s"] / rate


@pytest.mark.parametrize("name", [IN_PROCESS, SERVER])
def test_a_wrong_text_of_ours_has_no_speed(name):
    ways = {each: Canned(count_up) for each in (IN_PROCESS, SERVER, VLLM)}
    ways[name] = Canned(lambda ids, n: count_up([1] if n == 2 else ids, n))
    with pytest.raises(RunError, match=f"{name} gives other texts .* for 25% of the answers"):
        rows_of(ways, [[1], [2]], ServeBenchConfig(requests=2, seconds=0.01))


def test_other_software_may_round_otherwise():
    ways = {each: Canned(count_up) for each in (IN_PROCESS, SERVER)}
    ways[VLLM] = Canned(lambda ids, n: count_up([1] if n == 2 else ids, n))
    rows = rows_of(ways, [[1], [2]], ServeBenchConfig(requests=2, seconds=0.01))
    assert [row["same_as_engine"] for row in rows] == [1.0, 1.0, 0.75]


def test_over_http_comes_what_comes_in_process(mosaic):
    prompts = [[5, 6, 7], [200, 201], [8]]
    with running(mosaic) as server:
        engine = InProcess(
            PlainDecoder(load(mosaic), length=64, slots=3),
            server.served.tokenizer,
            server.served.stop,
            9,
        )
        http = OverHttp(server.url.removesuffix("/v1"), "mosaic", 9)
        want = engine.ask(prompts)
        found = http.ask(prompts)
        assert [each[:2] for each in found] == [each[:2] for each in want]
        assert all(0.0 < answer.first_s < 60.0 for answer in found + want)
        http.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"models": ()}, "models is empty"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"requests": 1}, "requests must be at least 2, got 1"),
        ({"prompt_tokens": 600}, "prompt_tokens must be at most data.block=512"),
        ({"threads": -1}, "threads must be at least 0"),
    ],
)
def test_settings_are_checked(options, words):
    with pytest.raises(InputError, match=words):
        ServeBenchConfig(**options)


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory):
    """A DSMoE that vLLM can hold too, beside a text."""
    root = tmp_path_factory.mktemp("bench-serve")
    options = {"vocab_size": 260, "max_position_embeddings": 512}
    options |= {"head_dim": 32, "intermediate_size": 128}
    model = converted(Case("llama", options), router_options={"bias": True})
    save(model, root / "mosaic", new_manifest("none", model), byte_tokenizer())
    write_text(root / "text")
    return root / "mosaic"


def bench(mosaic, out, *options):
    """The rows of the command by way."""
    settings = {"models": mosaic, "requests": 3, "prompt-tokens": 6, "tokens": 8, "threads": 1}
    settings |= {"data.sources": mosaic.parent / "text", "data.block": 64, "seconds": 0.1}
    argv = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    assert main(["bench", "serve", *argv, "--out", str(out), *options]) == 0
    result = json.loads(out.read_text())
    (cell,) = result["cells"]
    page = hooks.serving_table("x.json", result)
    for row in cell["rows"]:
        assert f"| mosaic | {row['way']} |" in page
    return {row["way"]: row for row in cell["rows"]}


def check_rows(rows, *ways):
    for way in ways:
        assert rows[way]["same_as_engine"] == 1.0
        assert set(rows[way]["requests"]) == {"1", "3"}
        for found in rows[way]["requests"].values():
            assert found["of_engine"] > 0
            assert 0 < found["first_p50_s"] <= found["first_p95_s"]


@needs_engine
@pytest.mark.slow
def test_the_command(mosaic, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(process.VARIABLE, str(tmp_path / "no-vllm"))
    rows = bench(mosaic, tmp_path / "out.json")
    check_rows(rows, IN_PROCESS, SERVER)
    assert "make vllm-env" in rows[VLLM]["skipped"]
    assert "of the engine" in capsys.readouterr().out


@needs_engine
@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_is_beside_it(mosaic, tmp_path):
    rows = bench(mosaic, tmp_path / "out.json")
    check_rows(rows, IN_PROCESS, SERVER)
    assert rows[VLLM]["requests"]["3"]["tokens_per_s"] > 0


def test_without_the_extra_it_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "moesaic.evaluation.bench.serve.ways")
    monkeypatch.delitem(sys.modules, "moesaic.evaluation.bench.serve.bench")
    assert main(["bench", "serve"]) == 1
    assert "moesaic bench serve needs openai; pip install 'moesaic[serve]'" in (
        capsys.readouterr().err
    )


def test_dry_run(mosaic, capsys):
    assert main(["bench", "serve", "--models", str(mosaic), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == 1
