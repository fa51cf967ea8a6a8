"""The committed results in other software: all there, agreeing, and as fast as promised."""

import json

from test_house import ROOT, hooks

RESULT = json.loads((ROOT / "bench" / "results" / "runtimes-smollm2.json").read_text())
(CELL,) = RESULT["cells"]
ROWS = {(row["runtime"], row["model"]): row for row in CELL["rows"]}


def test_every_runtime_ran_all_that_it_can_hold():
    runtimes = ("transformers", "moesaic", "vllm", "llama.cpp")
    models = ("dense", "fixed k", "variable k")
    assert set(ROWS) == {(runtime, model) for runtime in runtimes for model in models}
    skipped = {key for key, row in ROWS.items() if "skipped" in row}
    assert skipped == {("llama.cpp", "variable k")}
    assert "-dirty" not in RESULT["commit"]


def test_runtimes_agree():
    for (_, model), row in ROWS.items():
        if "skipped" not in row:
            ours = ROWS["moesaic", model]["perplexity"]
            assert abs(row["perplexity"] / ours - 1) < 0.01
            # llama.cpp's attention rounds to float16, so near ties fall otherwise now and then.
            assert row["same_as_ours"]["tokens"] >= 0.75


def test_ours_is_the_fastest_for_one_request_and_for_several():
    for (_, model), row in ROWS.items():
        for requests in () if "skipped" in row else row["tokens_per_s"]:
            ours = ROWS["moesaic", model]["tokens_per_s"][requests]["median"]
            assert row["tokens_per_s"][requests]["median"] <= ours


def test_the_page_shows_it():
    page = hooks.render("<!-- runtimes -->")
    for runtime, model in ROWS:
        assert f"| {runtime} | {model} |" in page


def test_servers_give_the_texts_of_the_engine():
    for path in sorted((ROOT / "bench" / "results").glob("serve-*.json")):
        result = json.loads(path.read_text())
        assert "-dirty" not in result["commit"]
        page = hooks.render("<!-- serving -->")
        for cell in result["cells"]:
            rows = {row["way"]: row for row in cell["rows"]}
            assert set(rows) == {"moesaic in process", "moesaic serve", "vllm serve"}
            for way, row in rows.items():
                assert f"| {cell['model']} | {way} | 1 |" in page
                assert row["same_as_engine"] == 1.0 or way == "vllm serve"


def test_llama_cpp_is_faster_with_the_mosaic():
    result = json.loads((ROOT / "bench" / "results" / "gguf-llama-1.1b.json").read_text())
    assert "-dirty" not in result["commit"]
    faster = {
        (cell["weights"], cell["test"]): row["faster_than_dense"]
        for cell in result["cells"]
        for row in cell["rows"]
        if row["method"] == "moesaic" and cell["active"] == 0.375
    }
    for weights, least in (("BF16", 1.6), ("Q8_0", 1.6), ("Q4_0", 1.4)):
        assert faster[weights, "decode"] >= least
        assert faster[weights, "prefill"] >= 1.0
        assert f"| {weights} | decode of 64 tokens |" in hooks.render("<!-- gguf -->")
