"""`moesaic generate --show-routing`: the experts of every token, in colour and in plain text."""

import ast
import io
import json
import re

import pytest
import torch
from model_cases import Case, converted
from recipe_cases import byte_tokenizer, write_model
from rich.console import Console

from moesaic.cli._routing import RoutedText, show_routing
from moesaic.cli.main import main
from moesaic.inference import Job, PlainDecoder
from moesaic.inference.activity import ActiveShare
from moesaic.models.checkpoint import load, new_manifest, save
from moesaic.nn.layer import record_routing

NEW = 6


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory):
    case = Case("llama", {"vocab_size": 260, "max_position_embeddings": 512})
    model = converted(case, router_options={"normalize": "none"})
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    directory = tmp_path_factory.mktemp("routing") / "mosaic"
    save(model, directory, new_manifest("tiny", model), tokenizer)
    return directory


@pytest.fixture(scope="module")
def expected(mosaic):
    """Ids, and the experts of the rows that chose them, [L, T, E]."""
    return routed(load(mosaic), "abc")


def routed(model, text):
    ids = torch.tensor([byte_tokenizer()(text)["input_ids"]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
    )
    with torch.no_grad(), record_routing(model) as routings:
        model(out[:, :-1])
    used_LTE = torch.stack([routing.active_TE() for routing in routings])
    return out[0, ids.shape[1] :].tolist(), used_LTE[:, ids.shape[1] - 1 :]


def generated(capsys, mosaic, *options):
    argv = ["generate", str(mosaic), "--prompt", "abc", "--max-new-tokens", str(NEW)]
    assert main([*argv, "--show-routing", *options]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("engine", ["auto", "transformers"])
def test_json_tells_the_experts_of_every_token(mosaic, capsys, expected, engine):
    ids, used_LTE = expected
    found = json.loads(generated(capsys, mosaic, "--json", "--engine", engine))
    assert found["text"] == byte_tokenizer().decode(ids)
    assert len(found["tokens"]) == NEW
    for token, used_LE in zip(found["tokens"], used_LTE.unbind(1), strict=True):
        for layer, used_E in enumerate(used_LE):
            assert token["experts"][str(layer)] == used_E.nonzero().flatten().tolist()
        assert token["active"] == pytest.approx(float(used_LE.float().mean()))


def test_plain_text_has_a_line_for_every_token(mosaic, capsys, expected):
    ids, used_LTE = expected
    rows = [line.split("\t") for line in generated(capsys, mosaic).splitlines()]
    fractions = [f"{float(used_LE.float().mean()):.3f}" for used_LE in used_LTE.unbind(1)]
    assert [row[0] for row in rows] == fractions
    text = "".join(ast.literal_eval(row[-1]) for row in rows)
    assert text == byte_tokenizer().decode(ids)
    rows = [
        line.split("\t") for line in generated(capsys, mosaic, "--routing-layer", "1").splitlines()
    ]
    sets = [",".join(map(str, used_E.nonzero().flatten().tolist())) for used_E in used_LTE[1]]
    assert [row[1] for row in rows] == [used or "-" for used in sets]


@pytest.mark.parametrize("layer", [None, 0])
def test_a_terminal_shows_colours(mosaic, expected, layer):
    _, used_LTE = expected
    model = load(mosaic)
    console = Console(
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        width=500,
        highlight=False,
    )
    text = RoutedText(PlainDecoder(model, length=64), ActiveShare(model), byte_tokenizer())
    job = Job(prompt_T=byte_tokenizer()("abc")["input_ids"], max_new_tokens=NEW)
    show_routing(console, text, job, layer)
    body, _, legend = console.file.getvalue().rpartition("\n\n")
    colours = re.findall(r"48;2;(\d+;\d+;\d+)m", body)
    rows = used_LTE.unbind(1)
    keys = [float(r.float().mean()) if layer is None else tuple(r[layer].tolist()) for r in rows]
    shown = [key for key, has in zip(keys, _has_text(model), strict=True) if has]
    assert len(colours) == len(shown)
    by_key = {}
    for key, colour in zip(shown, colours, strict=True):
        assert by_key.setdefault(key, colour) == colour
    if layer is None:
        assert legend.startswith("active: ")
    else:
        assert len(set(by_key.values())) == len(by_key)
        assert "experts of layer 0:" in legend


def _has_text(model):
    """Whether a token came with text: half a character waits for the rest."""
    text = RoutedText(PlainDecoder(model, length=64), ActiveShare(model), byte_tokenizer())
    job = Job(prompt_T=byte_tokenizer()("abc")["input_ids"], max_new_tokens=NEW)
    return [bool(token.text) for token in text.stream(job)]


def test_chat_goes_through_the_template(mosaic, capsys):
    argv = ["generate", str(mosaic), "--prompt", "abc", "--max-new-tokens", str(NEW), "--json"]
    assert main([*argv, "--chat"]) == 0
    ids, _ = routed(load(mosaic), "<abc>")
    assert json.loads(capsys.readouterr().out)["text"] == byte_tokenizer().decode(ids)


def test_what_has_no_routing_is_refused(mosaic, capsys, tmp_path):
    dense = write_model(tmp_path / "dense")
    argv = ["--prompt", "a", "--show-routing"]
    for model, options, message in (
        (dense, argv, "this model has no routers, so there is no routing to show; convert it"),
        (mosaic, [*argv, "--routing-layer", "2"], "routing_layer must be one of [0, 1], which"),
        (mosaic, ["--prompt", "a", "--routing-layer", "0"], "add --show-routing"),
    ):
        assert main(["generate", str(model), *options]) == 2
        assert message in capsys.readouterr().err
