"""A calibration is complete, bounded, resumable, and refuses what it cannot serve."""

import contextlib
import weakref
from types import SimpleNamespace

import pytest
import torch
from calibration_cases import BLOCK, DEEP, LLAMA, Killed, Watch, ids_of, make_text, network_inputs
from model_cases import DIM, LAYERS, Case, converted, dense_model, read_all
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moesaic._config import to_plain
from moesaic._errors import CheckpointError, InputError, RunError
from moesaic.calibration import CalibrationConfig, calibrate, run, walk
from moesaic.calibration.stats import MANIFEST, layer_file, open_stats
from moesaic.models.ffn import decoder_layers
from moesaic.nn.layer import moe_layers

TEXT = make_text()
TOKENS = TEXT.num_tokens
CONFIG = CalibrationConfig(tokens=TOKENS)
COLLECTORS = ("inputs", "moments", "neurons")


def files(directory):
    """Every file that is left, with its bytes."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def calibrate_deep(directory, watch=None, **options):
    values = {"collectors": COLLECTORS, "config": CONFIG, "text": TEXT, **options}
    return calibrate(
        values.get("model") or dense_model(DEEP),
        values["text"],
        values["collectors"],
        values["config"],
        directory,
        watch or Watch(),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of a run that nothing interrupted."""
    directory = tmp_path_factory.mktemp("whole") / "stats"
    calibrate_deep(directory)
    return files(directory)


def test_every_layer_is_measured(tmp_path):
    model = dense_model(LLAMA)
    stats = calibrate(model, TEXT, COLLECTORS, CONFIG, tmp_path)
    assert (stats.num_layers, stats.num_tokens) == (LAYERS, TOKENS)
    assert stats.collectors == tuple(sorted(COLLECTORS))
    assert stats.text["sources"] == to_plain(TEXT.provenance)
    sample = TEXT.take(len(TEXT), seed=0)
    seen = network_inputs(model, LLAMA, ids_of(sample))
    for index, (h_TD, ffn) in enumerate(zip(seen, read_all(model), strict=True)):
        got = stats.layer(index)
        assert torch.equal(got["inputs.h_TD"], h_TD.bfloat16())
        torch.testing.assert_close(got["moments.mean_D"], h_TD.mean(0), rtol=1e-4, atol=1e-5)
        mean_F = ffn.neurons(h_TD).mean(0)
        torch.testing.assert_close(got["neurons.mean_F"], mean_F, rtol=1e-4, atol=1e-5)


def test_converted_model_is_measured(tmp_path):
    model = converted(LLAMA)
    stats = calibrate(model, TEXT, ("grams", "routes", "inputs"), CONFIG, tmp_path)
    for index, moe in enumerate(moe_layers(model)):
        got = stats.layer(index)
        active = (got["routes.weights_TK"] != 0).float().mean()
        with torch.no_grad():
            want = moe.router(got["inputs.h_TD"].float()).active_TE().float().mean()
        assert abs(active - want) < 0.02


def test_blocks_are_drawn_by_the_seed(tmp_path):
    drawn = [
        calibrate_deep(
            tmp_path / str(seed),
            collectors=("inputs",),
            config=CalibrationConfig(tokens=2 * BLOCK, seed=seed),
        ).layer(0)["inputs.h_TD"]
        for seed in (0, 1)
    ]
    assert drawn[0].shape == (2 * BLOCK, DIM)
    assert not torch.equal(drawn[0], drawn[1])


def test_tokens_are_rounded_down_to_blocks(tmp_path):
    stats = calibrate_deep(tmp_path, config=CalibrationConfig(tokens=3 * BLOCK - 1))
    assert stats.num_tokens == 2 * BLOCK


@pytest.mark.parametrize(("chunk", "batch_blocks"), [(7, 4), (1024, 1)])
def test_chunks_and_batches_change_nothing(chunk, batch_blocks, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_CHUNK", chunk)
    want = calibrate_deep(tmp_path / "a")
    config = CalibrationConfig(tokens=TOKENS, batch_blocks=batch_blocks)
    got = calibrate_deep(tmp_path / "b", config=config)
    for index in range(4):
        for name, value in want.layer(index).items():
            # Inputs are kept in bfloat16.
            tolerance = 1e-2 if name == "inputs.h_TD" else 1e-4
            torch.testing.assert_close(
                got.layer(index)[name], value, rtol=tolerance, atol=tolerance, msg=name
            )


# In tokens: before the first layer ends, inside the second, at the very end of the third.
@pytest.mark.parametrize(("stop_after", "missing"), [(64, 4), (TOKENS + 10, 3), (3 * TOKENS, 1)])
def test_killed_run_goes_on(stop_after, missing, whole, tmp_path):
    with pytest.raises(Killed):
        calibrate_deep(tmp_path, Watch(stop_after))
    with pytest.raises(CheckpointError, match=r"calibration.json is missing, so .* no finished"):
        open_stats(tmp_path)
    watch = Watch()
    calibrate_deep(tmp_path, watch)
    assert watch.done == watch.total == missing * TOKENS
    assert files(tmp_path) == whole


@pytest.mark.parametrize("owner", ["walk", "run"])
def test_killed_between_two_files(owner, whole, tmp_path, monkeypatch):
    """A layer's statistics are written and its states are not; or everything but the manifest."""

    def killed(path, *args):
        if owner == "walk" or path.name == MANIFEST:
            raise Killed
        return write(path, *args)

    name = {"walk": "keep", "run": "write_json"}[owner]
    write = getattr({"walk": walk, "run": run}[owner], name)
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr({"walk": walk, "run": run}[owner], name, killed)
        calibrate_deep(tmp_path)
    assert layer_file(tmp_path, 0).is_file()
    watch = Watch()
    calibrate_deep(tmp_path, watch)
    assert watch.done == (4 * TOKENS if owner == "walk" else 0)
    assert files(tmp_path) == whole


def test_what_a_killed_write_left_goes(whole, tmp_path):
    (tmp_path / ".key.json.123.tmp").write_text("{")
    with pytest.raises(Killed):
        calibrate_deep(tmp_path, Watch(stop_after=TOKENS + 10))
    (tmp_path / ".hidden.safetensors.123.tmp").write_bytes(b"half")
    calibrate_deep(tmp_path)
    assert files(tmp_path) == whole
    # Killed after the manifest, before the states were deleted.
    (tmp_path / "hidden.safetensors").write_bytes(b"old")
    calibrate_deep(tmp_path)
    assert files(tmp_path) == whole


def test_finished_run_is_opened(whole, tmp_path):
    calibrate_deep(tmp_path)
    watch = Watch()
    stats = calibrate_deep(tmp_path, watch)
    assert watch.total == 0
    assert stats == open_stats(tmp_path)
    assert files(tmp_path) == whole


@pytest.mark.parametrize(
    "options",
    [
        {"model": dense_model(DEEP, seed=9)},
        {"text": make_text(seed=9)},
        {"collectors": ("inputs",)},
        {"config": CalibrationConfig(tokens=TOKENS, batch_blocks=1)},
    ],
    ids=["model", "text", "collectors", "config"],
)
@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
def test_directory_of_another_run_is_refused(options, finished, tmp_path):
    with contextlib.suppress(Killed):
        calibrate_deep(tmp_path, Watch() if finished else Watch(stop_after=TOKENS + 10))
    before = files(tmp_path)
    with pytest.raises(
        InputError, match=r"holds the calibration of another model, text or config; choose another"
    ):
        calibrate_deep(tmp_path, **options)
    assert files(tmp_path) == before


def test_foreign_directory_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty and holds no calibration; choose another"):
        calibrate_deep(tmp_path)
    assert list(files(tmp_path)) == ["thesis.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"collectors": ("neuron",)}, r"collector 'neuron' is unknown; did you mean neurons"),
        (
            {"config": CalibrationConfig(tokens=BLOCK - 1)},
            r"calibration tokens must be at least one block of 16, got 15; raise it",
        ),
        (
            {"config": CalibrationConfig(tokens=TOKENS + BLOCK)},
            r"calibration asks for 112 tokens, the text has 96; lower calibration tokens or give",
        ),
        ({"collectors": ("routes",)}, r"collector 'routes' needs converted layers .*convert the"),
        (
            {"collectors": ("neurons",), "model": converted(LLAMA)},
            r"collector 'neurons' needs a dense network, got a converted layer; give the dense",
        ),
    ],
    ids=["name", "short", "long", "routes", "neurons"],
)
def test_bad_input_is_refused_before_any_work(options, message, tmp_path):
    watch = Watch()
    with pytest.raises(InputError, match=message):
        calibrate_deep(tmp_path / "stats", watch, **options)
    assert watch.total == 0
    assert not (tmp_path / "stats").exists()


@pytest.mark.parametrize("values", [{"tokens": 0}, {"batch_blocks": 0}], ids=str)
def test_settings_out_of_bounds(values):
    with pytest.raises(InputError, match=r"tokens and batch_blocks must be at least 1, got \d+"):
        CalibrationConfig(**values)


def test_too_little_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(InputError, match=r"calibration needs 0.00 GB in .*free some space"):
        calibrate_deep(tmp_path)


def test_layer_that_saw_no_tokens(tmp_path, monkeypatch):
    model = dense_model(LLAMA)
    monkeypatch.setattr(
        decoder_layers(model)[1], "forward", lambda hidden_states, **_: hidden_states
    )
    with pytest.raises(RunError, match=r"network of layer 1 saw 0 of 96 tokens"):
        calibrate(model, TEXT, ("moments",), CONFIG, tmp_path)


def test_expert_that_saw_no_tokens(tmp_path):
    model = converted(LLAMA, router_options={"bias": True})
    with torch.no_grad():
        moe_layers(model)[1].router.bias[2] = -100.0
    with pytest.raises(
        RunError, match=r"in layer 1 experts \[2\] saw none of 96 tokens; calibrate on more text"
    ):
        calibrate(model, TEXT, ("routes",), CONFIG, tmp_path)


def test_damaged_files_are_named(tmp_path):
    stats = calibrate_deep(tmp_path)
    file = layer_file(tmp_path, 2)
    kept = file.read_bytes()
    file.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(CheckpointError, match=r"layer_002.safetensors cannot be read .*delete"):
        stats.layer(2)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"layer_002.safetensors is missing; delete .* again"):
        calibrate_deep(tmp_path)
    file.write_bytes(kept)
    (tmp_path / MANIFEST).write_text("{", "utf-8")
    with pytest.raises(CheckpointError, match=r"calibration.json is not valid JSON"):
        open_stats(tmp_path)
    for record in ('{"num_layers": 4}', "[]", '{"num_layers": "many"}'):
        (tmp_path / MANIFEST).write_text(record, "utf-8")
        with pytest.raises(CheckpointError, match=r"calibration.json was edited or is of another"):
            open_stats(tmp_path)


def test_require_names_what_is_missing(tmp_path):
    stats = calibrate_deep(tmp_path, collectors=("inputs", "moments"))
    stats.require("inputs", "moments", by="anyone", num_layers=4)
    with pytest.raises(
        InputError, match=r"anyone needs the collector 'neurons', but .* has inputs, moments; cal"
    ):
        stats.require("inputs", "neurons", by="anyone", num_layers=4)
    with pytest.raises(InputError, match=r"measured on 4 layers, the model has 5; calibrate this"):
        stats.require("inputs", by="anyone", num_layers=5)


class Live(TorchDispatchMode):
    """Notes the most bytes that tensors made meanwhile hold at once, beside a model's own."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.now = self.most = 0
        own = [] if model is None else [*model.parameters(), *model.buffers()]
        self.known = {tensor.untyped_storage()._cdata for tensor in own}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.known:
                storage = leaf.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def forget(self, key: int, num_bytes: int) -> None:
        self.known.discard(key)
        self.now -= num_bytes


def peak(tmp_path, case, num_blocks, collectors):
    text = make_text(num_blocks)
    model = dense_model(case)
    config = CalibrationConfig(tokens=text.num_tokens, batch_blocks=1)
    with Live(model) as live:
        calibrate(model, text, collectors, config, tmp_path / f"{case}-{num_blocks}")
    return live.most


@pytest.mark.parametrize(
    ("collectors", "bytes_per_token"),
    [
        # Hidden states and the inputs of one network.
        (("moments",), 2 * 4 * DIM),
        # And those inputs in bfloat16, joined.
        (("inputs",), 2 * 4 * DIM + 2 * 2 * DIM),
    ],
    ids=["moments", "inputs"],
)
def test_memory_is_bounded(collectors, bytes_per_token, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_CHUNK", 32)
    small, large = (peak(tmp_path, LLAMA, n, collectors) for n in (64, 128))
    # The ids are 8 bytes a token.
    assert 0.9 * bytes_per_token < (large - small) / (64 * BLOCK) <= bytes_per_token + 16
    deep = peak(tmp_path, DEEP, 128, collectors)
    assert deep < 1.02 * large


def test_the_measure_notices_what_is_kept():
    with Live() as live:
        kept = [torch.zeros(100) + 1 for _ in range(5)]
        del kept
        torch.zeros(10)
    assert 5 * 400 <= live.most <= 6 * 400
    assert live.now <= 40


@pytest.mark.parametrize(
    "case", [Case("gpt2", {}), Case("opt", {}), Case("gemma3_text", {})], ids=str
)
def test_other_architectures(case, tmp_path):
    model = dense_model(case)
    stats = calibrate(model, TEXT, COLLECTORS, CONFIG, tmp_path)
    h_TD = network_inputs(model, case, ids_of(TEXT.take(len(TEXT), seed=0)))[1]
    got = stats.layer(1)["inputs.h_TD"]
    assert (got.float() - h_TD).norm() < 0.01 * h_TD.norm()
