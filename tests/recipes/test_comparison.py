"""The protocol from its file to its report, and what a kill, a crash and a refusal leave."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from comparison_cases import in_process, stable, values
from hypothesis import given
from hypothesis import strategies as st
from recipe_cases import write_model, write_text

from moesaic._errors import CheckpointError, InputError, RunError, UnknownNameError
from moesaic._progress import SILENT
from moesaic.compression._table import COMPRESSIONS
from moesaic.recipes.claim import held
from moesaic.recipes.comparison import (
    Selection,
    all_cells,
    build_protocol,
    cell_of,
    compare,
    estimate,
    read_lines,
    read_protocol,
    select,
    write_comparison,
)
from moesaic.recipes.comparison.lines import RESULTS, add_line
from moesaic.recipes.comparison.process import Outcome
from moesaic.recipes.comparison.run import grid_of


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("comparison")
    write_model(root / "dense")
    write_text(root / "text")
    return root


@pytest.fixture(scope="module")
def finished(root):
    protocol = build_protocol(values(root))
    lines = compare(protocol, root / "whole", run=in_process)
    return protocol, lines


@pytest.fixture
def plugin():
    """The bad methods, registered for one test."""
    sys.modules.pop("comparison_plugin", None)
    yield {"plugins": ["comparison_plugin"]}
    if module := sys.modules.get("comparison_plugin"):
        for name in module.NAMES:
            COMPRESSIONS._records.pop(name, None)


class Watch:
    """Counts what every stage tells."""

    def __init__(self):
        self.done = Counter()

    @contextlib.contextmanager
    def stage(self, name, total, unit):
        yield SimpleNamespace(advance=lambda n=1.0: self.done.update({name: n}))


def test_every_cell_has_its_line(finished, root):
    protocol, lines = finished
    assert [cell_of(line) for line in lines] == all_cells(protocol)
    assert [(line["method"], line["active"], line["trained"]) for line in lines] == [
        (method, active, trained)
        for trained in (False, True)
        for method in ("dsmoe", "flap")
        for active in (0.75, 0.5)
    ]
    assert read_lines(root / "whole") == lines
    for line in lines:
        assert line["status"] == "done"
        quality, cost = line["quality"], line["cost"]
        assert quality["ratio_low"] <= quality["ratio"] <= quality["ratio_high"]
        assert quality["domains"].keys() == {"notes"}
        assert cost["active_parameters"] < cost["total_parameters"] or line["static"]
        assert line["config"]["active"] == line["active"]
        assert line["trained_tokens"] == (256 if line["trained"] else 0)
        assert (line["train"] is not None) == line["trained"]
        assert line["peak_bytes"] > 1 << 20
        assert {"conversion", "evaluation", "total"} <= line["seconds"].keys()
        assert ("training" in line["seconds"]) == line["trained"]
        assert line["versions"]["moesaic"]
        assert line["static"] == (line["method"] == "flap")
        # Only what has sigmoid gates can be held to a budget.
        held_to = line["active"] if line["method"] == "dsmoe" and line["trained"] else 0.0
        assert line["trained_budget"] == held_to
    flap = [line for line in lines if line["method"] == "flap"]
    assert [x["cost"]["active_ffn_fraction"] for x in flap] == pytest.approx([0.75, 0.5] * 2)


def test_training_is_the_same_for_all(finished):
    _, lines = finished
    trained = [line["train"] for line in lines if line["trained"]]
    assert all(one == trained[0] for one in trained)
    by_cell = {(x["method"], x["active"], x["trained"]): x["quality"]["ratio"] for x in lines}
    assert by_cell["flap", 0.5, True] != by_cell["flap", 0.5, False]


def test_nothing_of_the_work_is_left(finished, root):
    directory = root / "whole"
    assert not list(directory.rglob("checkpoint-*"))
    assert not list(directory.rglob("layers"))
    assert len(list(directory.glob("cells/*/training/metrics.jsonl"))) == 4


def test_a_finished_comparison_does_nothing_more(finished, root):
    protocol, lines = finished
    nothing = pytest.fail
    assert compare(protocol, root / "whole", run=lambda *a: nothing("worked again")) == lines


def test_the_report_is_written(finished, root):
    protocol, _ = finished
    comparison, files = write_comparison(protocol, root / "whole")
    page = (root / "whole" / "report.html").read_text("utf-8")
    assert "methods compared on" in page
    assert page.count("<svg role=") == 2
    text = (root / "whole" / "report.md").read_text("utf-8")
    assert "### Without training" in text
    assert "### After training on 256 tokens" in text
    assert "| flap (static) |" in text
    assert set(files) == {"report", "markdown"}
    assert comparison.dense["quality"]["ratio"] == 1.0


def test_one_cell_is_done_again_and_gives_the_same(finished, root):
    protocol, lines = finished
    only = Selection(only=("method=flap", "active=0.5", "trained=false"))
    calls = []

    def run(piece, log, progress):
        calls.append(piece.get("cell"))
        return in_process(piece, log, progress)

    again = compare(protocol, root / "whole", only, redo=True, run=run)
    assert calls == [None, {"method": "flap", "active": 0.5, "seed": 0, "trained": False}]
    assert sorted(map(str, stable(again))) == sorted(map(str, stable(lines)))


def test_changed_settings_of_a_method_make_its_cells_new(finished, root):
    protocol, lines = finished
    changed = values(root)
    changed["methods"]["flap"]["options"]["compensate"] = False
    changed["trained"] = [False]
    calls = []

    def run(piece, log, progress):
        calls.append(piece.get("cell", {}).get("method"))
        return in_process(piece, log, progress)

    new = compare(build_protocol(changed), root / "whole", run=run)
    assert calls == [None, "flap", "flap"]
    assert len(new) == len(lines)
    other = build_protocol(values(root, data={**values(root)["data"], "block": 16}))
    with pytest.raises(InputError, match=r"another protocol.data.block \(32, not 16\)"):
        compare(other, root / "whole", run=in_process)
    compare(protocol, root / "whole", run=in_process)


def test_a_setting_that_came_after_a_line_had_its_default_there(finished, root):
    protocol, lines = finished
    grid = grid_of(protocol)
    for line in lines:
        cell = cell_of(line)
        older = {**line, "config": dict(line["config"])}
        name, other = ("shared", 1) if line["method"] == "dsmoe" else ("compensate", False)
        changed = {**line, "config": {**line["config"], name: other}}
        del older["config"][name]
        if line["method"] == "dsmoe":
            older["config"]["router"] = dict(line["config"]["router"])
            del older["config"]["router"]["rank"]
        assert grid.is_current(cell, older)
        assert not grid.is_current(cell, changed)
        # The budget of the cell is no default.
        del older["config"]["active"]
        assert not grid.is_current(cell, older)


def test_shards_bring_together_what_one_run_has(finished, root, tmp_path):
    _, lines = finished
    protocol = build_protocol(values(root, trained=[False]))
    places = [tmp_path / "a", tmp_path / "b"]
    for number, place in enumerate(places, start=1):
        compare(protocol, place, Selection(shard=f"{number}/2"), run=in_process)
    comparison, _ = write_comparison(protocol, places[0], places[1:])
    whole = [line for line in lines if not line["trained"]]
    assert stable(comparison.lines) == stable(whole)
    with pytest.raises(InputError, match="holds no results of this protocol"):
        write_comparison(protocol, places[0], [tmp_path / "nowhere"])


CELLS = st.builds(
    dict,
    budgets=st.lists(st.sampled_from([0.75, 0.5, 0.375, 0.25]), min_size=1, unique=True),
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
    trained=st.lists(st.booleans(), min_size=1, max_size=2, unique=True),
)


@given(options=CELLS, count=st.integers(1, 9))
def test_shards_partition_the_cells(options, count):
    protocol = build_protocol({"model": "m", "methods": values(".")["methods"], **options})
    cells = all_cells(protocol)
    assert len({cell.key for cell in cells}) == len(cells)
    parts = [select(cells, Selection(shard=f"{i}/{count}")) for i in range(1, count + 1)]
    assert sorted(cell.key for part in parts for cell in part) == sorted(c.key for c in cells)
    for trained in options["trained"]:
        sizes = [sum(cell.trained == trained for cell in part) for part in parts]
        assert max(sizes) - min(sizes) <= 1, "no part has all the training"


def test_a_method_without_a_seed_has_one_cell_until_it_is_trained():
    protocol = build_protocol(
        {"model": "m", "methods": values(".")["methods"], "budgets": [0.5], "seeds": [3, 4]}
    )
    assert [cell.key for cell in all_cells(protocol)] == [
        "dsmoe-0.5-seed3",
        "dsmoe-0.5-seed4",
        "flap-0.5-seed3",
        "dsmoe-0.5-seed3-trained",
        "dsmoe-0.5-seed4-trained",
        "flap-0.5-seed3-trained",
        "flap-0.5-seed4-trained",
    ]
    assert protocol.methods["dsmoe"].config(0.5, 4).seed == 4


def test_a_method_may_have_fewer_cells_or_others():
    methods = {
        "flap": {"compress": "flap"},
        "teal": {"compress": "teal", "budgets": [0.5], "trained": [False]},
        "more": {"compress": "flap", "budgets": [0.9], "trained": [True]},
    }
    protocol = build_protocol(values(".", methods=methods))
    assert [cell.key for cell in all_cells(protocol)] == [
        "flap-0.75-seed0",
        "flap-0.5-seed0",
        "teal-0.5-seed0",
        "flap-0.75-seed0-trained",
        "flap-0.5-seed0-trained",
        "more-0.9-seed0-trained",
    ]
    assert build_protocol(protocol.plain()) == protocol


SELECTIONS = {
    ("method=flp",): "method of the protocol 'flp' is unknown; did you mean flap",
    ("metod=flap",): "field of a cell 'metod' is unknown; did you mean method",
    ("flap",): "only must be field=value, got 'flap'; try method=flap",
    ("active=0.6",): "only active=0.6 names no cell of the protocol; it has 0.5, 0.75",
    ("trained=1",): "only trained=1 names no cell of the protocol; it has false, true",
}


@pytest.mark.parametrize("only", SELECTIONS, ids=lambda only: only[0])
def test_a_wrong_selection_is_refused(only):
    cells = all_cells(build_protocol(values(".")))
    with pytest.raises(InputError, match=SELECTIONS[only]):
        select(cells, Selection(only=only))


def test_selections_add_up_and_narrow_down():
    cells = all_cells(build_protocol(values(".")))
    both = select(cells, Selection(only=("method=flap", "method=dsmoe", "active=0.5")))
    assert [cell.key for cell in both if not cell.trained] == ["dsmoe-0.5-seed0", "flap-0.5-seed0"]
    trained = select(cells, Selection(only=("trained=true", "seed=0")))
    assert all(cell.trained for cell in trained)
    assert len(trained) == 4
    for shard in ("2", "0/2", "3/2", "a/b", "1/0"):
        with pytest.raises(InputError, match="shard must be i/n"):
            select(cells, Selection(shard=shard))


def method(**item):
    return {"methods": {"one": item}}


BROKEN = {
    "method": (method(convert="dsmoo"), "conversion 'dsmoo' is unknown; did you mean dsmoe"),
    "kind": (method(convertt="dsmoe"), "must have either convert or compress"),
    "both": (method(convert="dsmoe", compress="flap"), "must have either convert or compress"),
    "option": (
        method(compress="flap", options={"multipl": 1}),
        "option 'multipl' is unknown; did you mean multiple",
    ),
    "item": (method(compress="flap", opts={}), "option 'opts' is unknown; did you mean options"),
    "twice": (method(compress="flap", method="flap"), "names its method twice"),
    "active": (
        method(compress="flap", options={"active": 0.5}),
        "options.active comes from budgets; leave it out",
    ),
    "seed": (
        method(convert="dsmoe", options={"seed": 1}),
        "options.seed comes from seeds; leave it out",
    ),
    "own training": (
        method(compress="flap", train={"tokens": 5}),
        "train.tokens is the same for all methods; set it in protocol.train",
    ),
    "own budget": (method(compress="flap", budgets=[0]), r"one.budgets must be in \(0, 1\], got 0"),
    "own budgets": (
        method(compress="flap", budgets=[0.5, 0.5]),
        "one.budgets must be a list of di",
    ),
    "own trained": (
        method(compress="flap", trained=[1]),
        r"one.trained\[0\] must be a bool, got 1",
    ),
    "own seeds": (method(compress="flap", seeds=[1]), "one option 'seeds' is unknown"),
    "trained bound": (
        method(bound="neuron-bound", trained=[False, True]),
        r"one.trained must be \[false\], got \[False, True\]: neuron-bound has noth",
    ),
    "name": ({"methods": {"a/b": {"compress": "flap"}}}, "must be of letters, digits"),
    "no methods": ({"methods": {}}, "must be a mapping of names to methods"),
    "budget": ({"budgets": [0.5, 1.5]}, r"budgets must be in \(0, 1\], got 1.5"),
    "no budgets": ({"budgets": []}, "budgets must have at least one value, got none"),
    "budgets": ({"budgets": [0.5, 0.5]}, "protocol.budgets must be a list of distinct values"),
    "seeds": ({"seeds": [1, 1]}, "seeds must be a list of distinct values"),
    "negative": ({"seeds": [-1]}, "seeds must be at least 0, got -1"),
    "train": ({"train": {"active": 0.5}}, "protocol.train.active comes from budgets"),
    "train option": ({"train": {"tokenz": 5}}, "option 'tokenz' is unknown; did you mean tokens"),
    "train kind": ({"train": [1]}, "protocol.train must be a mapping"),
    "plugin": ({"plugins": ["no_such_module"]}, "'no_such_module', which Python does not find"),
    "unknown": ({"budget": [0.5]}, "protocol option 'budget' is unknown; did you mean budgets"),
    "blocks": ({"heldout": {"blocks_per_domain": 0}}, "blocks_per_domain must be at least 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_protocol_is_refused(name):
    change, message = BROKEN[name]
    with pytest.raises(InputError, match=message):
        build_protocol(values(".") | change)


def test_the_file_is_read_strictly(tmp_path):
    path = tmp_path / "p.yaml"
    with pytest.raises(InputError, match="does not exist"):
        read_protocol(path)
    path.write_text("methods: [")
    with pytest.raises(InputError, match="is not YAML"):
        read_protocol(path)
    path.write_text("[1]")
    with pytest.raises(InputError, match="must be a mapping"):
        read_protocol(path)
    path.write_text(yaml.safe_dump(values(tmp_path)))
    protocol = read_protocol(path, ["train.tokens=512", "methods.flap.options.multiple=4"])
    assert protocol.train.tokens == 512
    assert protocol.methods["flap"].config(0.5, 0).multiple == 4
    assert build_protocol(protocol.plain()) == protocol


def test_the_committed_protocol_is_valid():
    path = Path(__file__).resolve().parents[2] / "bench" / "quality.yaml"
    protocol = read_protocol(path)
    assert protocol.budgets == (0.75, 0.5, 0.375, 0.25)
    assert len(protocol.seeds) >= 3


def test_work_that_cannot_start_is_refused(root, tmp_path):
    for change, message in (
        ({"calibration": {"tokens": 16}}, "at least one block of 32, got 16"),
        ({"train": {"tokens": 8}}, "at least one step of 32, got 8"),
        ({"data": {**values(root)["data"], "block": 1024}}, "at most the 512 positions"),
        ({"model": "./nowhere"}, "model directory ./nowhere does not"),
    ):
        with pytest.raises(InputError, match=message):
            compare(build_protocol(values(root) | change), tmp_path / "out", run=in_process)
        assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match=r"calibration.tokens is 1000000, the text has \d+"):
        compare(
            build_protocol(values(root, calibration={"tokens": 1_000_000})),
            tmp_path / "out",
            run=in_process,
        )


def test_a_refused_budget_is_a_line(root, tmp_path, plugin):
    methods = {"picky": {"compress": "picky"}}
    options = {"methods": methods, "budgets": [0.75, 0.3, 0.25], "trained": [False], **plugin}
    protocol = build_protocol(values(root, **options))
    lines = {line["active"]: line for line in compare(protocol, tmp_path, run=in_process)}
    assert lines[0.75]["status"] == "done"
    assert lines[0.3]["status"] == lines[0.25]["status"] == "refused"
    # One by its settings, the other by the method.
    assert lines[0.3]["reason"] == "active must be a quarter or a multiple, got 0.3; try 0.5"
    assert lines[0.25]["reason"] == "active must be at least 0.5, got 0.25; raise it"
    assert compare(protocol, tmp_path, run=lambda *a: pytest.fail("tried again"))
    _, files = write_comparison(protocol, tmp_path)
    for file in map(Path, files.values()):
        assert "active must be at least 0.5, got 0.25; raise it" in file.read_text("utf-8")


def test_what_does_not_fit_the_model_is_refused_before_any_work(root, tmp_path):
    methods = {
        "channels": {"compress": "llm-pruner-channel"},
        "dsmoe": {"convert": "dsmoe", "options": {"experts": 7}},
        "blocks": {"bound": "block-bound", "options": {"options": {"experts": 10}}},
    }
    options = {"methods": methods, "budgets": [0.7], "trained": [False]}
    protocol = build_protocol(values(root, **options))
    lines = compare(protocol, tmp_path, run=lambda *a: pytest.fail("worked"))
    assert [line["status"] for line in lines] == ["refused"] * 3
    assert "multiple of the 4 heads" in lines[0]["reason"]
    assert "experts=7 does not divide the FFN width" in lines[1]["reason"]
    assert "experts=10 does not divide the FFN width" in lines[2]["reason"]
    assert compare(protocol, tmp_path, run=lambda *a: pytest.fail("tried again")) == lines


def test_a_method_may_leave_an_ordinary_dense_model(root, tmp_path, plugin):
    options = {"methods": {"thin": {"compress": "thin"}}, "budgets": [0.5], **plugin}
    free, trained = compare(build_protocol(values(root, **options)), tmp_path, run=in_process)
    for line in (free, trained):
        assert line["status"] == "done"
        assert line["cost"]["active_ffn_fraction"] == pytest.approx(0.5)
    assert trained["quality"]["ratio"] != free["quality"]["ratio"]


def test_an_error_is_a_line_and_is_tried_again(root, tmp_path, plugin):
    flag = tmp_path / "flag"
    methods = {
        "crashes": {"compress": "crashes", "options": {"flag": str(flag)}},
        "flap": values(root)["methods"]["flap"],
    }
    options = {"methods": methods, "budgets": [0.5], "trained": [False], **plugin}
    protocol = build_protocol(values(root, **options))

    def run(piece, log, progress):
        try:
            return in_process(piece, log, progress)
        except RuntimeError as error:
            return Outcome(status="error", reason=str(error))

    first = compare(protocol, tmp_path / "out", run=run)
    assert [line["status"] for line in first] == ["error", "done"]
    assert first[0]["reason"] == "two and two make five"
    flag.touch()
    second = compare(protocol, tmp_path / "out", run=run)
    assert [line["method"] for line in second] == ["flap", "crashes"]
    assert {line["status"] for line in second} == {"done"}


def test_a_directory_serves_one_process(root, tmp_path):
    protocol = build_protocol(values(root))
    (tmp_path / "out").mkdir()
    with held(tmp_path / "out"), pytest.raises(InputError, match="another process works in"):
        compare(protocol, tmp_path / "out", run=in_process)


def test_a_damaged_line_is_named(tmp_path):
    cell = {"method": "a", "active": 0.5, "seed": 0, "trained": False, "status": "done"}
    add_line(tmp_path, cell)
    add_line(tmp_path, {**cell, "active": 0.25})
    add_line(tmp_path, {**cell, "again": True})
    assert [line["active"] for line in read_lines(tmp_path)] == [0.25, 0.5]
    with (tmp_path / RESULTS).open("a") as handle:
        handle.write('{"method": "b"}\n')
    with pytest.raises(CheckpointError, match="line 3, is no line of a cell"):
        read_lines(tmp_path)


def test_the_dry_run_says_what_is_left(finished, root):
    protocol, lines = finished
    cells = all_cells(replace(protocol, budgets=(0.75, 0.5, 0.25)))
    wider = replace(protocol, budgets=(0.75, 0.5, 0.25))
    listed = estimate(wider, root / "whole", cells)
    assert [entry["done"] for entry in listed] == [True, True, False] * 4
    assert all(entry["seconds"] >= 0 for entry in listed)
    # What was measured here counts: the same method, trained or not.
    mine = [x["seconds"]["total"] for x in lines if x["method"] == "flap" and x["trained"]]
    assert listed[-1]["seconds"] == pytest.approx(sum(mine) / len(mine), abs=0.06)
    fresh = estimate(wider, root / "nothing", cells)
    by_key = {cell.key: entry["seconds"] for cell, entry in zip(cells, fresh, strict=True)}
    assert by_key["flap-0.5-seed0-trained"] >= by_key["flap-0.5-seed0"]
    assert not (root / "nothing").exists()


def start(code, *arguments):
    """Run Python code in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        },
    )


def kill_when(process, condition):
    """Kill a process as soon as a condition holds; only that process."""
    while process.poll() is None and not condition():
        time.sleep(0.005)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()


@pytest.mark.slow
def test_a_killed_run_ends_the_same(finished, root, tmp_path):
    _, lines = finished
    wanted = values(root, budgets=[0.5], methods={"flap": values(root)["methods"]["flap"]})
    path, out = tmp_path / "p.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(wanted))
    process = start(
        "import sys; from moesaic.cli.main import main; main(sys.argv[1:])",
        *("compare", path, "--out", out),
    )
    # The first cell has its line, the second is in the middle of its training.
    checkpoint = out / "cells/flap-0.5-seed0-trained/training/checkpoint-2/trainer_state.json"
    kill_when(process, checkpoint.exists)
    assert [line["trained"] for line in read_lines(out)] == [False]
    again = compare(read_protocol(path), out, run=in_process)
    whole = [x for x in lines if x["method"] == "flap" and x["active"] == 0.5]
    assert stable(again) == stable(whole)
    assert [line["resumed"] for line in again] == [False, True]
    # It went on from the checkpoint and wrote no step twice.
    log = out / "cells/flap-0.5-seed0-trained/training/metrics.jsonl"
    assert [json.loads(x)["step"] for x in log.read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_piece_ends_with_its_parent(root, tmp_path, plugin):
    methods = {"waits": {"compress": "slow-start", "options": {"flag": str(tmp_path / "never")}}}
    options = {"methods": methods, "budgets": [0.5], "trained": [False], **plugin}
    protocol = build_protocol(values(root, **options))
    piece = {"directory": str(tmp_path), "protocol": protocol.plain()}
    in_process({**piece, "collectors": ["neurons"]}, None, SILENT)
    (cell,) = all_cells(protocol)
    process = start(
        "import json, pathlib, sys\n"
        "from moesaic._progress import SILENT\n"
        "from moesaic.recipes.comparison.process import run_piece\n"
        "run_piece(json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]), SILENT)",
        json.dumps({**piece, "cell": cell.plain()}),
        tmp_path / "log",
    )
    children = []

    def waits():
        children[:] = psutil.Process(process.pid).children() if process.poll() is None else []
        return (tmp_path / "cells" / cell.key / "cell.json").exists()

    kill_when(process, waits)
    (child,) = children
    child.wait(timeout=30)


@pytest.mark.slow
def test_a_crash_of_one_method_is_one_line(root, tmp_path, plugin):
    methods = {
        "killed": {"compress": "killed"},
        "crashes": {"compress": "crashes"},
        "flap": values(root)["methods"]["flap"],
    }
    options = {"methods": methods, "budgets": [0.5], "trained": [False], **plugin}
    watch = Watch()
    found = compare(build_protocol(values(root, **options)), tmp_path / "out", progress=watch)
    lines = {line["method"]: line for line in found}
    assert lines["flap"]["status"] == "done"
    assert lines["killed"]["status"] == lines["crashes"]["status"] == "error"
    assert lines["killed"]["reason"] == "the process was ended by SIGKILL, as when memory is full"
    assert lines["crashes"]["reason"] == (
        "RuntimeError: two and two make five; see logs/crashes-0.5-seed0.log"
    )
    logs = tmp_path / "out" / "logs"
    assert "Traceback" in (logs / "crashes-0.5-seed0.log").read_text()
    # What was told from the other processes arrived, and what a method printed did not disturb it.
    counts = {"cells": 3, "load the parent": 1, "perplexity of dense": 4, "perplexity of flap": 4}
    assert counts.items() <= watch.done.items()
    # A process of its own has its own memory, and at least that of torch.
    assert lines["flap"]["peak_bytes"] > 100 << 20


def test_a_name_that_is_not_registered_is_an_error_with_suggestions():
    with pytest.raises(UnknownNameError, match="compression 'flpa' is unknown; did you mean flap"):
        build_protocol(values(".", methods={"one": {"compress": "flpa"}}))
