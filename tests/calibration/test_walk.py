"""A walk sees what the whole model computes, layer by layer, whatever the architecture."""

import pytest
import torch
from calibration_cases import DEEP, LLAMA, Killed, Watch, ids_of, make_text, network_inputs
from model_cases import ROWS, Case, converted, dense_model
from safetensors.torch import load_file

from moesaic._errors import CheckpointError, InputError, RunError
from moesaic.calibration.walk import walk_layers
from moesaic.models.ffn import decoder_layers

# Both kinds of attention in one model, and blocks longer than the window of eight.
MIXED = [
    Case("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}),
    Case("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}),
    Case("gpt_neox", {"use_parallel_residual": False}),
    Case("opt", {"do_layer_norm_before": False}),
]
IDS = ids_of(make_text())


def walk(model, **options):
    return [visit.h_TD.clone() for visit in walk_layers(model, IDS, **options)]


@pytest.mark.parametrize("case", [*ROWS, *MIXED], ids=str)
def test_walk_sees_what_the_model_computes(case, tmp_path):
    model = dense_model(case, torch.float64)
    want = network_inputs(model, case, IDS)
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
    store = tmp_path / "hidden.safetensors"
    layers = decoder_layers(model)
    for visit, h_TD in zip(walk_layers(model, IDS, store=store), want, strict=True):
        assert visit.layer is layers[visit.index]
        torch.testing.assert_close(visit.h_TD, h_TD)
        if visit.index:
            # What the store holds at a layer is what the model gives to it.
            torch.testing.assert_close(load_file(store)["hidden"], states[visit.index])


@pytest.mark.parametrize("case", [Case("gemma2", {}), Case("gemma3_text", {}), Case("mistral", {})])
def test_windows_matter(case):
    """Otherwise the test above would not tell whether layers got their own mask."""
    model = dense_model(case, torch.float64)
    wide = dense_model(Case(case.model_type, {"sliding_window": 64}), torch.float64)
    near, far = walk(model)[-1], walk(wide)[-1]
    assert (near - far).abs().max() > 1e-3


@pytest.mark.parametrize("case", [LLAMA, Case("gpt2", {}), Case("opt", {})], ids=str)
def test_walk_of_a_converted_model(case):
    model = converted(case, torch.float64)
    for got, want in zip(walk(model), network_inputs(model, case, IDS), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("batch_blocks", [1, 4, 5, 100])
def test_batch_size_changes_nothing(batch_blocks):
    model = dense_model(Case("gemma3_text", {}), torch.float64)
    for got, want in zip(walk(model, batch_blocks=batch_blocks), walk(model), strict=True):
        torch.testing.assert_close(got, want)


def test_half_precision_stays():
    model = dense_model(LLAMA, torch.bfloat16)
    want = network_inputs(model, LLAMA, IDS)
    for got, exact in zip(walk(model), want, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - exact).float().norm() < 0.02 * exact.float().norm()


def test_walk_leaves_no_hooks_and_needs_no_gradient():
    model = dense_model(LLAMA)
    for visit in walk_layers(model, IDS):
        assert not visit.h_TD.requires_grad
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_hooks_are_gone_after_a_failure():
    model = dense_model(LLAMA)
    with pytest.raises(Killed):
        walk(model, progress=Watch(stop_after=20))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_progress_counts_tokens_of_all_layers():
    watch = Watch()
    walk(dense_model(DEEP), progress=watch)
    assert watch.done == watch.total == 4 * IDS.numel()


@pytest.mark.parametrize("visited", [0, 1, 3])
def test_walk_goes_on_after_the_last_visited_layer(visited, tmp_path):
    model = dense_model(DEEP)
    want = walk(model)
    store = tmp_path / "hidden.safetensors"
    for visit in walk_layers(model, IDS, store=store):
        if visit.index == visited:
            # Left before the loop came back: this layer does not count as visited.
            break
    rest = list(walk_layers(model, IDS, store=store))
    assert [visit.index for visit in rest] == list(range(visited, 4))
    again = {visit.index: visit.h_TD.clone() for visit in walk_layers(model, IDS, store=store)}
    assert again == {}
    store.unlink()
    got = []
    for visit in walk_layers(model, IDS, store=store):
        got.append(visit.h_TD.clone())
        if visit.index == visited:
            break
    got.pop()
    got += [visit.h_TD.clone() for visit in walk_layers(model, IDS, store=store)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_damaged_store_is_named(tmp_path):
    store = tmp_path / "hidden.safetensors"
    model = dense_model(LLAMA)
    walk(model, store=store)
    store.write_bytes(store.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"hidden.safetensors cannot be read .*delete"):
        walk(model, store=store)


@pytest.mark.parametrize(("times", "seen"), [(0, 0), (2, 192)], ids=["never", "twice"])
def test_network_that_does_not_run_once(times, seen, monkeypatch):
    model = dense_model(LLAMA)
    layer = decoder_layers(model)[1]

    def forward(hidden_states, **options):
        for _ in range(times):
            hidden_states = hidden_states + layer.mlp(hidden_states)
        return hidden_states

    monkeypatch.setattr(layer, "forward", forward)
    with pytest.raises(
        RunError, match=rf"network of layer 1 saw {seen} of 96 tokens, .*correct its row"
    ):
        walk(model)


def test_unknown_architecture_is_refused():
    model = dense_model(LLAMA)
    model.config.model_type = "lama"
    with pytest.raises(InputError, match=r"'lama' is unknown; did you mean llama"):
        walk(model)


def halve(layer):
    """Change what a layer gives."""
    with torch.no_grad():
        layer.mlp.down_proj.weight *= 0.5


@pytest.mark.parametrize("case", [*ROWS, *MIXED], ids=str)
def test_walk_in_sequence_of_an_unchanged_model_is_the_walk(case):
    model = dense_model(case, torch.float64)
    for got, want in zip(walk(model, sequential=True), walk(model), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("batch_blocks", [1, 4])
def test_walk_in_sequence_shows_what_changed_layers_give(batch_blocks):
    model = dense_model(DEEP, torch.float64)
    got = []
    for visit in walk_layers(model, IDS, sequential=True, batch_blocks=batch_blocks):
        got.append(visit.h_TD.clone())
        halve(visit.layer)
    for h_TD, want in zip(got, network_inputs(model, DEEP, IDS), strict=True):
        torch.testing.assert_close(h_TD, want)
    before = walk(dense_model(DEEP, torch.float64))
    assert torch.equal(got[0], before[0])
    assert (got[1] - before[1]).abs().max() > 1e-2
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("visited", [0, 2])
def test_walk_in_sequence_goes_on_after_the_last_visited_layer(visited, tmp_path):
    store = tmp_path / "hidden.safetensors"
    model = dense_model(DEEP)
    for visit in walk_layers(model, IDS, sequential=True, store=store):
        if visit.index == visited:
            break
        halve(visit.layer)
    # The layers that count as visited are as they were left; the one under way is not.
    rest = []
    for visit in walk_layers(model, IDS, sequential=True, store=store):
        rest.append((visit.index, visit.h_TD.clone()))
        halve(visit.layer)
    assert [index for index, _ in rest] == list(range(visited, 4))
    for index, h_TD in rest:
        torch.testing.assert_close(h_TD, network_inputs(model, DEEP, IDS)[index])


def test_walk_in_sequence_counts_tokens_of_all_layers():
    watch = Watch()
    walk(dense_model(DEEP), sequential=True, progress=watch)
    assert watch.done == watch.total == 4 * IDS.numel()


def test_network_that_does_not_run_in_sequence(monkeypatch):
    model = dense_model(LLAMA)
    monkeypatch.setattr(
        decoder_layers(model)[1], "forward", lambda hidden_states, **_: hidden_states
    )
    with pytest.raises(RunError, match=r"network of layer 1 saw 0 of 96 tokens, .*correct its row"):
        walk(model, sequential=True)
