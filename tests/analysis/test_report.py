"""The report holds the record's numbers, whole and safe, and leaves out what was not measured."""

import copy
import json
import re
from html.parser import HTMLParser

import pytest
from records import make_record

from moesaic._errors import InputError
from moesaic.analysis import render_report, write_report

SECTIONS = {"table", "curve", "layers", "tokens", "texts", "training", "done"}
VOID = {"meta", "line", "circle", "rect", "path", "image", "br", "link", "img"}


class Page(HTMLParser):
    """What a reader finds in the page: tables, ids, attributes, texts, balance of the tags."""

    def __init__(self, html):
        super().__init__()
        self.ids, self.attributes, self.tags, self.open = [], [], [], []
        self.tables, self.text, self.passages = {}, [], []
        self.values, self.cell = [], None
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs.items()]
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)
        if tag == "table":
            self.rows = self.tables.setdefault(attrs.get("id", attrs.get("class", "other")), [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append({"scope": attrs.get("scope"), "tag": tag, "text": ""})
            self.cell = self.rows[-1][-1]
        elif tag == "data":
            self.values.append(float(attrs["value"]))
            if self.cell is not None:
                self.cell["value"] = float(attrs["value"])
        elif tag == "div" and attrs.get("class") == "passage":
            self.passages.append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style",):
            return
        self.text.append(data)
        if self.cell is not None:
            self.cell["text"] += data
        if self.passages and "div" in self.open and self.open[-1] == "span":
            self.passages[-1] += data


def sections(html):
    return SECTIONS & set(Page(html).ids)


@pytest.fixture(scope="module")
def record():
    return make_record()


@pytest.fixture(scope="module")
def page(record):
    return Page(render_report(record))


def test_main_table_holds_every_number(record, page):
    rows = [r for r in page.tables["main"] if r[0]["tag"] == "th" and r[0]["scope"] == "row"]
    assert len(rows) == len(record["models"])
    for row, model in zip(rows, record["models"], strict=True):
        assert row[0]["text"].startswith(model["name"])
        quality, cost, speed = model["quality"], model["cost"], model["speed"]
        assert [cell["value"] for cell in row[1:]] == [
            *(quality["domains"][d]["perplexity"] for d in ("docs", "literature", "code")),
            quality["ratio"],
            cost["active_ffn_fraction"],
            cost["active_parameters"],
            cost["router_parameters"],
            cost["flops_per_token"],
            cost["bytes"],
            speed["prefill_tokens_per_s"]["median"],
            speed["decode_tokens_per_s"]["median"],
        ]
    assert "1.18-1.25" in rows[2][4]["text"]
    assert "1.35x dense" in rows[2][11]["text"]


def test_curve_table_holds_every_point(record, page):
    rows = [[cell["value"] for cell in row] for row in page.tables["curve-table"][1:]]
    assert rows == [
        [p["threshold"], p["active_ffn_fraction"], p["ratio"], *p["domains"].values()]
        for p in record["curve"]
    ]


def test_layer_table_holds_every_layer(record, page):
    rows = [[cell["value"] for cell in row[1:]] for row in page.tables["layer-table"][1:]]
    activation = record["activation"]
    assert rows == [
        list(row)
        for row in zip(
            activation["mean_per_layer"], *activation["per_domain"].values(), strict=True
        )
    ]


def test_heatmap_names_every_expert(record):
    html = render_report(record)
    titles = re.findall(r"layer (\d+), expert (\d+): active for ([\d.]+)% of tokens", html)
    assert len(titles) == 30 * 48
    for layer, expert, shown in titles[:: 7 * 13]:
        stored = record["activation"]["experts_per_layer"][int(layer)][int(expert)]
        assert float(shown) == pytest.approx(100 * stored, abs=0.051)


def test_every_table_heading_has_a_scope(page):
    headings = [c for rows in page.tables.values() for row in rows for c in row if c["tag"] == "th"]
    assert {h["scope"] for h in headings} == {"col", "row", "colgroup"}


def test_charts_are_named_for_screen_readers(page):
    roles = [v for tag, k, v in page.attributes if (tag, k) == ("svg", "role")]
    labels = [v for tag, k, v in page.attributes if (tag, k) == ("svg", "aria-label")]
    # Curve, layers, heatmap and four training charts.
    assert roles == ["img"] * 7
    assert len(labels) == 7
    assert all(len(label) > 40 for label in labels)


def test_tokens_read_as_the_text_they_are(record, page):
    assert len(page.passages) == 6
    for shown, example in zip(page.passages, record["examples"], strict=True):
        stored = "".join(token["text"] for token in example["tokens"])
        undone = shown.translate({0x21B5: "\n", 0x2192: None, 0xB7: " "})
        assert undone == stored


def test_nothing_comes_from_outside(record):
    for html in (render_report(record), render_report(make_record(layers=80, experts=256))):
        parsed = Page(html)
        links = [v for _, k, v in parsed.attributes if k in ("src", "href", "srcset", "action")]
        assert links
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
        assert not re.search(r"url\(|@import", html)
        assert "script" not in parsed.tags


def test_texts_of_the_record_are_escaped():
    attack = "<script>alert('x')</script>\"><img src=http://e.example/x onerror=a()>&amp;"
    record = make_record(layers=3, experts=4, domains=(attack, "code"))
    record["models"][2]["name"] = attack
    record["generations"] = [{"prompt": attack, "texts": {attack: attack + attack}}]
    record["machine"][attack] = attack
    record["manifest"]["steps"][0]["name"] = attack
    record["examples"][0]["tokens"][0]["text"] = attack
    parsed = Page(render_report(record))
    assert not {"script", "img"} & set(parsed.tags)
    assert not [k for _, k, _ in parsed.attributes if k.startswith("on")]
    assert "".join(parsed.text).count(attack) >= 8


def test_text_that_utf8_cannot_hold_is_replaced(tmp_path):
    record = make_record(layers=2, experts=2)
    record["generations"][0]["texts"]["dense"] = "half a character: \ud800. A bell: \x07."
    record["examples"][0]["tokens"][0]["text"] = "\x00\x1b"
    write_report(record, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text("utf-8")
    assert "half a character: ?." in html
    assert "\x00" not in html
    assert "\x1b" not in html
    assert "A bell: \ufffd." in html


def test_manifest_comes_back_as_json(record, page):
    assert json.dumps(record["manifest"], indent=1) in "".join(page.text)


@pytest.mark.parametrize(
    ("absent", "gone"),
    [
        (("curve",), ()),
        (("activation",), ("layers",)),
        (("activation", "examples"), ("layers", "tokens")),
        (("generations",), ("texts",)),
        (("training",), ("training",)),
        (("manifest", "machine", "data"), ("done",)),
    ],
    ids="-".join,
)
def test_absent_data_leaves_no_section(record, absent, gone):
    rest = {key: value for key, value in record.items() if key not in absent}
    html = render_report(rest)
    assert sections(html) == SECTIONS - set(gone)
    for name in gone:
        assert f'href="#{name}"' not in html


@pytest.mark.parametrize("empty", [None, "empty"])
def test_empty_data_leaves_no_section(record, empty):
    rest = copy.deepcopy(record)
    for key in ("curve", "activation", "examples", "generations", "training", "manifest"):
        rest[key] = None if empty is None else type(rest[key])()
    del rest["models"][1]
    assert sections(render_report(rest)) == {"table", "done"}


def test_smallest_record():
    html = render_report({"schema": 1, "models": [{"name": "dense", "kind": "dense"}]})
    assert sections(html) == {"table"}
    assert len(html) < 20_000
    assert "Measured without a converted model: dense." in html


def test_largest_record_stays_light():
    domains = tuple(f"domain {i}" for i in range(9))
    record = make_record(layers=80, experts=256, domains=domains, steps=20_000)
    record["examples"] = [dict(e, tokens=e["tokens"] * 40) for e in record["examples"] * 5]
    html = render_report(record)
    assert sections(html) == SECTIONS
    assert len(html) < 6_000_000
    assert "layer 79: mean" in html
    assert "3000 more tokens in the record" in html
    assert "4 more examples in the record" in html
    assert "each point is the mean of 50" in html


def test_layers_of_different_width_and_numbers_that_are_not_finite():
    record = make_record(layers=4, experts=6)
    record["activation"]["experts_per_layer"][1] = [0.5, float("nan")]
    record["activation"]["experts_per_layer"][2] = []
    record["models"][1]["quality"]["ratio"] = float("inf")
    record["models"][2]["quality"]["ratio_high"] = float("inf")
    record["training"][3]["loss"] = float("nan")
    record["curve"][0]["ratio"] = float("inf")
    parsed = Page(render_report(record))
    paths = [v for _, k, v in parsed.attributes if k in ("d", "cx", "cy", "x", "y", "y1", "y2")]
    assert not [p for p in paths if "nan" in p or "inf" in p]


def test_no_dense_parent():
    record = make_record(layers=2, experts=2)
    del record["models"][0]
    html = render_report(record)
    assert "x dense</small>" not in html
    assert sections(html) == SECTIONS


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], r"must be a JSON object, got list; give the file"),
        ({"models": [{"name": "a"}]}, r"has schema None, this version reads schema 1; evaluate"),
        ({"schema": 2, "models": [{"name": "a"}]}, r"has schema 2, this version reads schema 1"),
        ({"schema": 1}, r"has no 'models', and a report needs at least one; evaluate again"),
        ({"schema": 1, "models": []}, r"has no 'models'"),
        ({"schema": 1, "models": [{"kind": "dense"}]}, r"models\[0\] of the .* has no name"),
        (
            {"schema": 1, "models": [{"name": "a", "cost": {"bytes": "big"}}]},
            r"'bytes' in the evaluation record must be a number, got 'big'; evaluate again",
        ),
        (
            {"schema": 1, "models": [{"name": "a"}], "curve": {}},
            r"'curve' in the evaluation record must be a list, got \{\}",
        ),
        (
            {"schema": 1, "models": [{"name": "a"}], "activation": {"experts_per_layer": [0.5]}},
            r"'experts_per_layer\[0\]' in the evaluation record must be a list, got 0.5",
        ),
    ],
)
def test_bad_record_is_refused_in_one_sentence(record, message, tmp_path):
    with pytest.raises(InputError, match=message):
        write_report(record, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
