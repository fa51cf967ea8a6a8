"""The native experts against the reference, in every format, to the last bits that can agree.

Shapes: T tokens, K slots per token, E experts, F width of one expert, D model width.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from expert_cases import Case, Inputs

from moesaic._errors import InputError, RunError
from moesaic.nn.routers.sigmoid_threshold import SigmoidThreshold, SigmoidThresholdConfig
from moesaic.ops import select
from moesaic.ops.cpu import library, packed
from moesaic.ops.cpu.__main__ import main
from moesaic.ops.cpu.ffn import PackedFfn, PackedRouter
from moesaic.ops.cpu.packed import PackedExperts, PackedLinear, lanes
from moesaic.ops.reference import experts_reference
from moesaic.ops.select import apply_experts

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())

HAS_DOT = not library.why_not() and packed.has_dot()
FORMATS = ["float32", "bfloat16", "int8", *(["bfloat16-dot"] if HAS_DOT else [])]
EXACT_FORMATS = FORMATS[:3]  # those that round no activation
# Sets of instructions that this machine has, products of bfloat16 left out.
HAS_AVX512 = not library.why_not() and packed.lanes() == 16
LEVELS = [("avx2", 8), *([("avx512", 16)] if HAS_AVX512 else [])]
KINDS = [(gated, bias) for gated in (True, False) for bias in (False, True)]
CASES = [
    *(Case(T=T, gated=gated, bias=bias) for T in (0, 1, 63, 257) for gated, bias in KINDS),
    *(
        Case(gated=gated, bias=bias, pattern=pattern)
        for pattern in ("one-idle", "all-on-one", "some-empty", "all-empty")
        for gated, bias in KINDS
    ),
    *(Case(K=6, gated=gated, pattern="all-experts") for gated in (True, False)),
    # Whole registers need no padding; one more than that needs most.
    *(Case(D=D, F=F) for D, F in ((64, 32), (33, 17), (1, 1), (32, 48))),
    Case(T=700, D=40, F=24, pattern="some-empty", bias=True),
    Case(E=1, K=1),
]


def run(inputs: Inputs, weight_format: str) -> torch.Tensor:
    copy = PackedExperts(inputs.weights, weight_format)
    return copy(inputs.h_TD, inputs.ids_TK, inputs.weights_TK)


def round_rows(x: torch.Tensor) -> torch.Tensor:
    """What int8 keeps of rows along the last dimension."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, (x / scale).round() * scale, 0)


def rounded(inputs: Inputs, weight_format: str) -> Inputs:
    """The inputs with weights as a format stores them, in float64."""
    w = inputs.weights
    if weight_format == "bfloat16":
        w = w._replace(up=w.up.bfloat16().float(), down=w.down.bfloat16().float())
    elif weight_format == "int8":
        w = w._replace(up=round_rows(w.up), down=round_rows(w.down))
    return inputs._replace(weights=w).to(torch.float64)


@pytest.mark.parametrize("weight_format", EXACT_FORMATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference(case, weight_format):
    inputs = case.inputs(torch.float32)
    expected = experts_reference(*rounded(inputs, weight_format))
    torch.testing.assert_close(run(inputs, weight_format), expected.float(), rtol=2e-5, atol=2e-5)


def twice_rounded(inputs: Inputs) -> torch.Tensor:
    """Experts in float64 that round what they multiply to bfloat16: inputs, weights, neurons."""
    h_TD, ids_TK, weights_TK, w = inputs.to(torch.float64)

    def round_it(x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().double()

    out_TD = torch.zeros_like(h_TD)
    held_TK = (ids_TK >= 0) & (ids_TK < w.num_experts)
    for t, k in held_TK.nonzero().tolist():
        e, weight = ids_TK[t, k], weights_TK[t, k]
        bias = 0 if w.up_bias is None else w.up_bias[e]
        neurons_F = round_it(w.activate(round_it(w.up[e]) @ round_it(h_TD[t]) + bias) * weight)
        out_TD[t] += round_it(w.down[e]) @ neurons_F
        out_TD[t] += 0 if w.down_bias is None else w.down_bias[e] * weight
    return out_TD.float()


@pytest.mark.skipif(not HAS_DOT, reason="no AVX512-BF16")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dot_rounds_what_it_multiplies_and_nothing_else(case):
    inputs = case.inputs(torch.float32)
    expected, actual = twice_rounded(inputs), run(inputs, "bfloat16-dot")
    # A neuron that lies between two values may fall to the other side than in float64.
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    close_T = torch.isclose(actual, expected, rtol=2e-5, atol=2e-5).all(1)
    assert close_T.float().mean() >= 0.95 or case.T == 0


@pytest.mark.skipif(HAS_DOT, reason="this machine has AVX512-BF16")
def test_dot_is_refused_where_the_processor_lacks_it():
    with pytest.raises(InputError, match="needs a processor with AVX512-BF16"):
        PackedExperts(Case().inputs(torch.float32).weights, "bfloat16-dot")


@pytest.mark.parametrize("name", packed._ACTIVATIONS)
def test_every_activation(name):
    inputs = Case(gated=False, F=32).inputs(torch.float32)
    # Far out too, where exponentials end.
    inputs = inputs._replace(
        weights=inputs.weights._replace(activation=name), h_TD=inputs.h_TD * 40
    )
    expected = experts_reference(*inputs.to(torch.float64))
    torch.testing.assert_close(run(inputs, "float32"), expected.float(), rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_token_does_not_see_its_batch_to_the_last_bit(weight_format):
    inputs = Case(T=40, D=48, F=40, pattern="some-empty", bias=True).inputs(torch.float32)
    copy = PackedExperts(inputs.weights, weight_format)
    together = copy(inputs.h_TD, inputs.ids_TK, inputs.weights_TK)
    for t in range(40):
        one = slice(t, t + 1)
        alone = copy(inputs.h_TD[one], inputs.ids_TK[one], inputs.weights_TK[one])
        assert torch.equal(alone, together[one])


def test_threads_change_no_bit():
    inputs = Case(T=40, D=96, F=64).inputs(torch.float32)
    torch.set_num_threads(1)
    alone = run(inputs, "float32")
    try:
        torch.set_num_threads(2)
        assert torch.equal(run(inputs, "float32"), alone)
    finally:
        torch.set_num_threads(1)


def test_no_uninitialised_memory_is_read(monkeypatch):
    inputs = Case(pattern="some-empty").inputs(torch.float32)
    expected = run(inputs, "float32")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    assert torch.equal(run(inputs, "float32"), expected)


def test_strides_of_the_inputs_do_not_matter():
    h_TD, ids_TK, weights_TK, weights = Case(D=24, F=16).inputs(torch.float32)
    expected = PackedExperts(weights)(h_TD, ids_TK, weights_TK)
    strided = weights._replace(
        up=weights.up.transpose(1, 2).contiguous().transpose(1, 2),
        down=weights.down.transpose(1, 2).contiguous().transpose(1, 2),
    )
    actual = PackedExperts(strided)(
        h_TD.T.contiguous().T, ids_TK.T.contiguous().T, weights_TK.T.contiguous().T
    )
    assert torch.equal(actual, expected)


def test_ids_out_of_range_are_empty_slots():
    h_TD, ids_TK, weights_TK, weights = Case(pattern="some-empty").inputs(torch.float32)
    wild_TK = torch.where(ids_TK == -1, -(2**40), torch.where(ids_TK == 6, 2**40, ids_TK))
    copy = PackedExperts(weights)
    expected = copy(h_TD, ids_TK, weights_TK)
    assert torch.equal(copy(h_TD, wild_TK, weights_TK), expected)


def test_bfloat16_goes_in_and_out():
    inputs = Case().inputs(torch.bfloat16)
    out_TD = run(inputs, "bfloat16")
    assert out_TD.dtype == torch.bfloat16
    expected = experts_reference(*inputs.to(torch.float32))
    torch.testing.assert_close(out_TD, expected.bfloat16(), rtol=1e-2, atol=1e-2)


def test_packed_weights_share_nothing_with_those_they_were_made_of():
    """Sizes of whole panels, where nothing is padded: a decoder gives the weights up."""
    size = 4 * lanes()
    inputs = Case(D=size, F=size, bias=True).inputs(torch.float32)
    x_TI, weight_OI, bias_O = torch.randn(3, size), torch.randn(size, size), torch.randn(size)
    experts, linear = PackedExperts(inputs.weights), PackedLinear(weight_OI, bias_O)
    arguments = inputs.h_TD, inputs.ids_TK, inputs.weights_TK
    before = experts(*arguments), linear(x_TI)
    assert inputs.weights.up_bias is not None
    assert inputs.weights.down_bias is not None
    for given in (*inputs.weights[:2], inputs.weights.up_bias, inputs.weights.down_bias):
        given.fill_(torch.nan)
    weight_OI.fill_(torch.nan)
    bias_O.fill_(torch.nan)
    assert torch.equal(experts(*arguments), before[0])
    assert torch.equal(linear(x_TI), before[1])


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(
    ("T", "O", "I"), [(1, 1, 1), (13, 40, 17), (30, 64, 64), (3, 32, 512), (2, 32, 31)]
)
def test_linear_equals_torch(weight_format, T, O, I):
    draw = torch.Generator().manual_seed(0)
    weight_OI, bias_O = torch.randn(O, I, generator=draw), torch.randn(O, generator=draw)
    x_TI = torch.randn(T, I, generator=draw)
    stored = weight_OI.bfloat16().float() if weight_format.startswith("bfloat16") else weight_OI
    stored = round_rows(weight_OI) if weight_format == "int8" else stored
    read_TI = x_TI.bfloat16() if weight_format == "bfloat16-dot" else x_TI
    expected = (read_TI.double() @ stored.double().T + bias_O).float()
    actual = PackedLinear(weight_OI, bias_O, weight_format)(x_TI)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_bytes_are_those_of_the_format():
    weights = Case(D=64, F=64, E=2).inputs(torch.float32).weights
    numbers = 2 * 3 * 64 * 64
    sizes = {f: PackedExperts(weights, f).num_bytes for f in FORMATS}
    assert sizes["float32"] == 4 * numbers
    assert sizes["bfloat16"] == sizes.get("bfloat16-dot", 2 * numbers) == 2 * numbers
    # One scale for each of 2 * 128 rows of up and 2 * 64 of down.
    assert sizes["int8"] == numbers + 4 * 2 * (128 + 64)


def test_selected_when_packed_and_no_gradient_is_wanted(caplog, monkeypatch):
    monkeypatch.setattr(select, "_said", set())
    caplog.set_level(logging.INFO, logger="moesaic.ops.select")
    h_TD, ids_TK, weights_TK, weights = Case().inputs(torch.float32)
    calls = []
    native = PackedExperts.__call__
    monkeypatch.setattr(PackedExperts, "__call__", lambda *a: calls.append(1) or native(*a))
    weights = weights._replace(packed=PackedExperts(weights))
    expected = experts_reference(h_TD, ids_TK, weights_TK, weights)
    out_TD = apply_experts(h_TD, ids_TK, weights_TK, weights)
    torch.testing.assert_close(out_TD, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 1
    h_TD.requires_grad_()
    assert apply_experts(h_TD, ids_TK, weights_TK, weights).requires_grad
    h_TD.requires_grad_(False)
    weights.up.requires_grad_()
    assert apply_experts(h_TD, ids_TK, weights_TK, weights).requires_grad
    assert "packed weights give no gradient" in caplog.text
    with torch.no_grad():
        weights.up.mul_(2)
        changed = apply_experts(h_TD, ids_TK, weights_TK, weights)
        expected = experts_reference(h_TD, ids_TK, weights_TK, weights)
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-5)
    assert "changed since they were packed" in caplog.text
    assert len(calls) == 1


def test_native_without_a_copy_says_how_to_make_one():
    with pytest.raises(InputError, match="needs packed weights"):
        apply_experts(*Case().inputs(torch.float32), backend="native")


def test_an_own_gate_has_no_native_code():
    weights = Case().inputs(torch.float32).weights._replace(activation="", glu=lambda z: z)
    with pytest.raises(InputError, match=r"has no native code; .*silu"):
        PackedExperts(weights)


@pytest.mark.parametrize(("level", "lanes"), LEVELS)
def test_a_lesser_processor_gives_the_same(level, lanes):
    # On a machine of that level this is the same set once more.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch; torch.cpu._is_avx512_bf16_supported = lambda: False\n"
        "import test_native as t\n"
        f"assert torch.backends.cpu.get_cpu_capability() == {level.upper()!r}\n"
        f"assert t.packed.lanes() == {lanes}\n"
        "for case in t.CASES:\n"
        "    for f in t.FORMATS:\n"
        "        t.test_equals_reference(case, f)\n"
        "t.test_a_token_does_not_see_its_batch_to_the_last_bit('bfloat16')\n"
        "t.test_dot_is_refused_where_the_processor_lacks_it()\n"
    )
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(here)],
        env={
            **os.environ,
            "ATEN_CPU_CAPABILITY": level,
            "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "need the compiler no-such-compiler; install g++ or set CXX" in library.why_not()


def test_a_failing_compiler_says_so_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RunError, match="false could not compile the CPU kernels: no message"):
        library.library.__wrapped__()
    assert not list((tmp_path / "moesaic").iterdir())


def test_a_machine_without_avx2_is_told(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "need Linux on x86 with AVX2" in library.why_not()
    with pytest.raises(RunError, match="without them experts run in plain torch"):
        library.library.__wrapped__()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"value": "one", "normalize": "none", "bias": True}], ids=str
)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("T", [0, 1, 600])
def test_a_whole_layer_routes_and_sums_as_its_modules(T, threshold, options, dtype):
    torch.manual_seed(0)
    config = SigmoidThresholdConfig(threshold=threshold, **options)
    router = SigmoidThreshold(17, 6, config).to(dtype).eval()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(std=0.5)
    inputs = Case(T=T).inputs(dtype)
    layer = PackedFfn(
        router=PackedRouter(router.score_map(), router.choice()),
        experts=PackedExperts(inputs.weights, packed.exact_format_of(dtype)),
    )
    with torch.no_grad():
        routing = router(inputs.h_TD)
    wide = inputs.to(torch.float64)
    expected = experts_reference(
        wide.h_TD, routing.ids_TK, routing.weights_TK.double(), wide.weights
    )
    actual = layer(inputs.h_TD.float())
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-4)


def test_compiling_ahead_says_what_came_of_it(capsys, monkeypatch):
    main()
    assert capsys.readouterr().out == "native kernels are ready\n"
    assert library.state().startswith("compiled for AVX")
    monkeypatch.setattr(library, "why_not", lambda: "there is no compiler")
    main()
    assert capsys.readouterr().out == "there is no compiler; experts will run in plain torch\n"
    assert library.state() == "none: there is no compiler"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, h, i, w: c(h[:, :-1], i, w), r"inputs of shape \[T, 17\], got \(63, 16\)"),
        (
            lambda c, h, i, w: c(h, i[1:], w[1:]),
            r"ids and weights must be \[T=63, K\], got \(62, 3\)",
        ),
        (lambda c, h, i, w: c(h, i, w[:, 1:]), r"got \(63, 3\) and \(63, 2\)"),
        (lambda c, h, i, w: c(h.to("meta"), i, w), r"tensors on the CPU, got one on meta; move it"),
        (lambda c, h, i, w: c(h, i.to("meta"), w), r"tensors on the CPU, got one on meta"),
    ],
)
def test_what_native_code_would_misread_is_refused(call, message):
    h_TD, ids_TK, weights_TK, weights = Case().inputs(torch.float32)
    with pytest.raises(InputError, match=message):
        call(PackedExperts(weights), h_TD, ids_TK, weights_TK)


def test_weights_elsewhere_are_refused_before_they_are_packed():
    weights = Case().inputs(torch.float32).weights
    with pytest.raises(InputError, match="got one on meta"):
        PackedExperts(weights._replace(down=weights.down.to("meta")))
    with pytest.raises(InputError, match="got one on meta"):
        PackedLinear(torch.ones(3, 4, device="meta"), None)


def test_ids_of_32_bits_are_read_as_they_are():
    h_TD, ids_TK, weights_TK, weights = Case(pattern="some-empty").inputs(torch.float32)
    copy = PackedExperts(weights)
    expected = copy(h_TD, ids_TK, weights_TK)
    assert torch.equal(copy(h_TD, ids_TK.to(torch.int32), weights_TK), expected)


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "moesaic").write_text("a file where the directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        RunError, match=r"cannot be written to .*moesaic \(.*\); set XDG_CACHE_HOME"
    ):
        library.library.__wrapped__()


def test_the_compiler_may_be_a_command_with_words(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "env no-such-variable=1 false")
    assert library.why_not() == ""
    with pytest.raises(RunError, match="env could not compile the CPU kernels"):
        library.library.__wrapped__()
