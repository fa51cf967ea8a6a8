"""The Triton experts against the reference: output and every gradient, by name.

Without a GPU they run in Triton's interpreter, which is slow: few cases, each for a reason.
"""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from functools import partial

import pytest
import torch
from expert_cases import Case, run

from moesaic._errors import InputError
from moesaic.ops.grouped import experts_grouped
from moesaic.ops.reference import experts_reference
from moesaic.ops.triton import experts, experts_triton, why_not
from moesaic.ops.triton.plan import make_plan
from moesaic.ops.weights import ACTIVATIONS

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed; pip install 'moesaic[dev]'",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GATED, PLAIN = {"gated": True, "bias": True}, {"gated": False}
KINDS = [{"gated": gated, "bias": bias} for gated in (True, False) for bias in (False, True)]
# One tile of rows is 64, of columns 16, and 32 are multiplied at a time.
CASES = [
    *(Case(T=T, **kind) for T in (0, 1, 63) for kind in KINDS),
    *(Case(T=257, **kind) for kind in (GATED, PLAIN)),
    *(Case(pattern=p, **kind) for p in ("one-idle", "all-empty") for kind in (GATED, PLAIN)),
    *(Case(T=130, pattern="all-on-one", **kind) for kind in (GATED, PLAIN)),
    *(Case(D=35, F=19, pattern="some-empty", **kind) for kind in KINDS),
    Case(K=6, pattern="all-experts"),
    Case(E=1, K=1),
    Case(D=1, F=1, E=3, K=2),
]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fill new buffers with NaN, or with a row that does not exist."""

    def poison(empty):
        def filled(*args, **options):
            out = empty(*args, **options)
            return out.fill_(float("nan") if out.is_floating_point() else 10**6)

        return filled

    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


def on_device(inputs):
    to = partial(torch.Tensor.to, device=DEVICE)
    weights = inputs.weights._make(
        to(x) if isinstance(x, torch.Tensor) else x for x in inputs.weights
    )
    return inputs._make([*map(to, inputs[:3]), weights])


def assert_equal(actual, expected, rtol, atol):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def relative_rms(actual, expected):
    error, size = (actual.double() - expected.double()).norm(), expected.double().norm()
    return (error / size).item()


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference_in_float64(case):
    inputs = on_device(case.inputs(torch.float64))
    assert_equal(run(experts_triton, inputs), run(experts_reference, inputs), 1e-10, 1e-10)


@needs_triton
@pytest.mark.parametrize(
    "case", [Case(bias=True, pattern="some-empty"), Case(D=35, F=19), Case(gated=False)], ids=str
)
def test_equals_reference_in_float32(case):
    inputs = on_device(case.inputs(torch.float32))
    assert_equal(run(experts_triton, inputs), run(experts_reference, inputs), 1e-4, 1e-5)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [GATED, PLAIN], ids=["gated-bias", "plain"])
def test_half_precision_is_close_to_the_reference_in_float32(dtype, kind):
    inputs = on_device(Case(D=35, F=19, pattern="some-empty", **kind).inputs(dtype))
    # Routers give float32 weights whatever the dtype of the model.
    inputs = inputs._replace(weights_TK=inputs.weights_TK.float())
    actual, expected = run(experts_triton, inputs), run(experts_reference, inputs.to(torch.float32))
    assert actual["out"].dtype == dtype
    assert actual["weights"].dtype == torch.float32
    # The interpreter cuts bfloat16 off instead of rounding: an error twice as large, and biased.
    slack = 3 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1
    for name, value in expected.items():
        bound = slack * (6e-3 if name == "out" else 1e-2)
        assert relative_rms(actual[name], value) <= bound, name


@needs_triton
@pytest.mark.parametrize(
    ("gated", "scale"), [(True, 1.0), (True, 300.0), (False, 1.0)], ids=["gated", "large", "plain"]
)
@pytest.mark.parametrize(
    "name", ["gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "silu"]
)
def test_every_activation_equals_the_reference(name, gated, scale):
    inputs = on_device(Case(T=9, D=3, E=2, K=2, gated=gated).inputs(torch.float64))
    inputs = inputs._replace(
        h_TD=inputs.h_TD * scale, weights=inputs.weights._replace(activation=name)
    )
    actual, expected = run(experts_triton, inputs), run(experts_reference, inputs)
    atol = 1e-10 * max(1.0, expected["up"].abs().max().item())
    assert_equal(actual, expected, 1e-10, atol)


def test_every_name_of_an_activation_has_its_kernel():
    assert experts._ACTIVATIONS.keys() == ACTIVATIONS.keys()
    same = [set(), set()]
    for a, b in itertools.product(ACTIVATIONS, repeat=2):
        same[0] |= {(a, b)} if ACTIVATIONS[a] is ACTIVATIONS[b] else set()
        same[1] |= {(a, b)} if experts._ACTIVATIONS[a] == experts._ACTIVATIONS[b] else set()
    assert same[0] == same[1]


@needs_triton
def test_non_contiguous_inputs():
    inputs = on_device(Case(D=35, F=19, bias=True, pattern="some-empty").inputs(torch.float64))

    def scrambled(h_TD, ids_TK, weights_TK, weights):
        def turn(x):
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)

        views = weights._replace(up=turn(weights.up), down=turn(weights.down))
        out_TD = experts_triton(turn(h_TD), turn(ids_TK), turn(weights_TK), views)
        # Its gradient arrives turned too.
        return out_TD.T.contiguous().T

    assert_equal(run(scrambled, inputs), run(experts_reference, inputs), 1e-10, 1e-10)
    h_TD = inputs.h_TD.requires_grad_()
    (expanded,) = torch.autograd.grad(experts_triton(*inputs).sum(), h_TD)
    (expected,) = torch.autograd.grad(experts_reference(*inputs).sum(), h_TD)
    torch.testing.assert_close(expanded, expected)


LEAVES = ("h_TD", "weights_TK", "up", "down", "up_bias", "down_bias")


@needs_triton
@pytest.mark.parametrize("leaf", LEAVES)
def test_one_gradient_does_not_need_the_others(leaf):
    inputs = on_device(Case(T=20, bias=True, pattern="some-empty").inputs(torch.float64))
    x = getattr(inputs, leaf, None)
    x = (getattr(inputs.weights, leaf) if x is None else x).requires_grad_()
    probe_TD = torch.linspace(-1, 1, inputs.h_TD.numel(), device=DEVICE, dtype=torch.float64)
    grads = [
        torch.autograd.grad(path(*inputs), x, probe_TD.view_as(inputs.h_TD))[0]
        for path in (experts_triton, experts_reference)
    ]
    torch.testing.assert_close(*grads)


@needs_triton
def test_without_gradients_the_up_product_is_not_kept(monkeypatch):
    from moesaic.ops.triton import autograd

    kept = []
    launch = autograd._up
    monkeypatch.setattr(autograd, "_up", lambda *a: kept.append(launch(*a)) or kept[-1])
    inputs = on_device(Case(T=20).inputs(torch.float64))
    inputs.weights.up.requires_grad_()
    with torch.no_grad():
        out_TD = experts_triton(*inputs)
    assert not out_TD.requires_grad
    torch.testing.assert_close(out_TD, experts_reference(*inputs).detach())
    experts_triton(*inputs)
    assert [z_NC.numel() for z_NC, _ in kept] == [0, 60 * 10]


def saved_bytes(path, inputs, shared):
    """Bytes that autograd holds between the passes, those of shared tensors left out."""
    held = {}

    def hold(x):
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
        out_TD = path(*inputs)
    assert out_TD.requires_grad
    for x in shared:
        held.pop(x.untyped_storage().data_ptr(), None)
    return sum(held.values())


@needs_triton
def test_saved_bytes_do_not_grow_with_granularity():
    T, D, E = 64, 24, 8
    ours, torchs = [], []
    for K, F in ((2, 16), (4, 8)):
        inputs = on_device(Case(T=T, D=D, E=E, K=K, F=F).inputs(torch.bfloat16))
        inputs.weights_TK.requires_grad_()
        # h is the caller's, like the parameters: saving it is free, saving a copy is not.
        shared = [inputs.h_TD, inputs.weights.up, inputs.weights.down]
        for x in shared:
            x.requires_grad_()
        ours.append(saved_bytes(experts_triton, inputs, shared))
        torchs.append(saved_bytes(experts_grouped, inputs, shared))
        N = T * K
        # The slot's weight, its row and the row's slot; bounds of E experts; two numbers a tile.
        bookkeeping = (2 + 4 + 4) * N + 4 * (E + 1) + 8 * (N // 64 + E)
        if DEVICE == "cpu":
            assert ours[-1] == 4 * N * F + bookkeeping
    # 128 more slots of 10 bytes and 2 more tiles of 8.
    assert ours[1] - ours[0] == 128 * 10 + (16 if DEVICE == "cpu" else ours[1] - ours[0] - 1280)
    # Autograd also saves gathered copies of h, and more besides.
    assert torchs[1] - torchs[0] > 128 * 2 * D
    assert torchs[0] > 2 * ours[0]


def test_plan_by_hand():
    # Slots 0..7 hold 1 0 | 3(empty) 1 | -1(empty) 1 | 0 1 of 3 experts, in tiles of 2 rows.
    ids_TK = torch.tensor([[1, 0], [3, 1], [-1, 1], [0, 1]])
    plan = make_plan(ids_TK, 3, 2)
    # Expert 0 has the slots 1 and 6, expert 1 the slots 0 3 5 7, expert 2 none.
    assert plan.slot_N.tolist() == [1, 6, 0, 3, 5, 7, 2, 4]
    assert plan.row_TK.tolist() == [[2, 0], [-1, 3], [-1, 4], [1, 5]]
    assert plan.bounds.tolist() == [0, 2, 6, 6]
    # 8 / 2 + 3 tiles at most; three are needed.
    assert plan.tile_expert_M.tolist() == [0, 1, 1, 3, 3, 3, 3]
    assert plan.tile_row_M.tolist()[:3] == [0, 2, 4]


@pytest.mark.parametrize("tile_rows", [1, 16, 64])
@pytest.mark.parametrize("pattern", ["mixed", "some-empty", "all-on-one", "all-empty"])
def test_tiles_cover_every_held_row_once(pattern, tile_rows):
    ids_TK = Case(T=257, pattern=pattern).inputs(torch.float32).ids_TK
    plan = make_plan(ids_TK, 6, tile_rows)
    rows = []
    for expert, first in zip(plan.tile_expert_M.tolist(), plan.tile_row_M.tolist(), strict=True):
        if expert < 6:
            end = plan.bounds[expert + 1].item()
            rows += range(first, min(first + tile_rows, end))
            assert ids_TK.flatten()[plan.slot_N[first]] == expert
    assert rows == list(range(plan.bounds[-1].item()))


def test_plan_never_waits_for_the_device():
    from torch._subclasses.fake_tensor import FakeTensorMode

    # A fake tensor has no values: whatever asks for one raises.
    with FakeTensorMode():
        plan = make_plan(torch.zeros(63, 3, dtype=torch.int64), 6, 16)
    assert plan.tile_row_M.shape == (63 * 3 // 16 + 6,)


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_call_never_waits_for_the_device():
    inputs = on_device(Case(bias=True).inputs(torch.float32))
    inputs.h_TD.requires_grad_()
    experts_triton(*inputs).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts_triton(*inputs).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_triton
@pytest.mark.parametrize("h_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_multiplies_in_bfloat16(h_dtype):
    inputs = on_device(Case(bias=True).inputs(torch.float32))
    inputs = inputs._replace(h_TD=inputs.h_TD.to(h_dtype))

    def autocast(*args):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return experts_triton(*args)

    actual = run(autocast, inputs)
    for name, value in run(experts_reference, inputs.to(torch.float32)).items():
        # Three times the bounds of bfloat16: the interpreter cuts off instead of rounding.
        assert 1e-4 < relative_rms(actual[name], value) <= (1.8e-2 if name == "out" else 3e-2), name
    assert actual["out"].dtype == h_dtype


@needs_triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"glu": torch.sigmoid, "activation": ""}, r"an activation of \[.*\], got a function; use"),
        ({"up": torch.zeros(6, 10, 17, dtype=torch.int64)}, r"one dtype of \[.*\], got .*int64"),
        ({"down": torch.zeros(6, 17, 5).half()}, r"got \['torch.float16', 'torch.float32'\]; cast"),
    ],
    ids=["glu", "int64", "mixed"],
)
def test_what_kernels_cannot_take_is_refused(change, message):
    inputs = on_device(Case().inputs(torch.float32))
    weights = inputs.weights._replace(**change)
    assert why_not(inputs.h_TD, weights)
    with pytest.raises(InputError, match=message):
        experts_triton(*inputs[:3], weights)


@needs_triton
def test_a_cpu_is_refused_outside_the_interpreter(monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(InputError, match=r"needs a cuda device, got cpu; use another backend"):
        experts_triton(*Case().inputs(torch.float32))


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    inputs = Case().inputs(torch.float32)
    with pytest.raises(ImportError, match=r'not installed; pip install "moesaic\[gpu\]"'):
        experts_triton(*inputs)


def test_importing_does_not_need_triton():
    code = "import sys; sys.modules['triton'] = None; import moesaic, moesaic.ops.triton"
    subprocess.run([sys.executable, "-c", code], check=True)
