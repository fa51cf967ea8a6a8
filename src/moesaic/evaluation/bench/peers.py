"""What ours is compared with: the experts functions of transformers, and kt-kernel.

Shapes: T tokens, K slots per token, E experts, F width of one expert, D model width.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.evaluation.bench.ours import ExpertsCall
from moesaic.ops.weights import ExpertWeights

TRANSFORMERS = ("eager", "grouped_mm", "batched_mm")
KT_KERNEL = "kt-kernel"
# batched_mm gathers the weights of every slot, so its memory grows with the tokens.
_BATCHED_BYTES = 1e9


def transformers_experts(name: str, weights: ExpertWeights, num_slots: int) -> ExpertsCall:
    """Give an experts function of transformers, on the experts module of Mixtral.

    Args:
        name: `eager`, `grouped_mm` or `batched_mm`.
        weights: Gated experts with silu; their memory is shared.
        num_slots: K.
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        num_local_experts=weights.num_experts,
        num_experts_per_tok=num_slots,
        hidden_size=weights.up.shape[2],
        intermediate_size=weights.width,
        hidden_act=weights.activation,
    )
    config._experts_implementation = name
    with torch.device("meta"):
        module: Any = MixtralExperts(config)
    module.gate_up_proj = nn.Parameter(weights.up, requires_grad=False)
    module.down_proj = nn.Parameter(weights.down, requires_grad=False)
    return lambda h_TD, ids_TK, weights_TK: module(h_TD, ids_TK, weights_TK.to(h_TD.dtype))


def why_not_transformers(name: str, num_pairs: int, weights: ExpertWeights) -> str:
    """Say why a function is left out; empty if it is not."""
    expert_bytes = weights.up[0].nbytes + weights.down[0].nbytes
    if name == "batched_mm" and num_pairs * expert_bytes > _BATCHED_BYTES:
        return f"would gather {num_pairs * expert_bytes / 1e9:.1f} GB of weights, one per slot"
    return ""


@functools.cache
def why_not_kt() -> str:
    """Say why kt-kernel cannot run here; empty if it can.

    Its binary may stop the process with an illegal instruction, so another process tries it.
    """
    if importlib.util.find_spec("kt_kernel") is None:
        return "not installed; pip install --no-deps kt-kernel"
    code = (
        "import torch; from moesaic.evaluation.bench.peers import kt_experts; "
        "from moesaic.ops.weights import ExpertWeights; b = torch.bfloat16; "
        "w = ExpertWeights(torch.ones(2, 512, 256, dtype=b), torch.ones(2, 256, 256, dtype=b), "
        "'silu', True); i = torch.zeros(1, 1, dtype=torch.int64); "
        "kt_experts(w, 1, 1)(torch.ones(1, 256, dtype=b), i, torch.ones(1, 1))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        tried = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return "its trial did not end within 60 s"
    if tried.returncode < 0:
        return f"its binary stopped with signal {-tried.returncode} on this processor"
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or ["no message"])[-1]
        return f"its trial failed: {last}"
    return ""


def kt_experts(weights: ExpertWeights, num_slots: int, max_tokens: int) -> ExpertsCall:
    """Give the bfloat16 experts of kt-kernel, through its extension, with torch's thread count.

    Args:
        weights: Gated experts with silu in bfloat16; kt-kernel makes its own copy.
        num_slots: K.
        max_tokens: T at most.
    """
    with _stdout_to_stderr():
        import kt_kernel  # type: ignore[import-not-found]

        extension: Any = kt_kernel.kt_kernel_ext
        pool = _kt_pool(torch.get_num_threads())
        num_experts, _, dim = weights.up.shape
        on_gpu_E = torch.zeros(num_experts, dtype=torch.bool)
        config = extension.moe.MOEConfig(
            num_experts, num_slots, dim, weights.width, on_gpu_E.data_ptr()
        )
        config.layer_idx = 0
        config.pool = pool.backend_
        config.max_len = max(32, max_tokens)
        gate_EFD, up_EFD = (part.contiguous() for part in weights.up.chunk(2, dim=1))
        down_EDF = weights.down.contiguous()
        config.gate_projs = [[w.data_ptr() for w in gate_EFD]]
        config.up_projs = [[w.data_ptr() for w in up_EFD]]
        config.down_projs = [[w.data_ptr() for w in down_EDF]]
        none = [[0] * num_experts]
        config.gate_scales, config.up_scales, config.down_scales = none, none, none
        kind = getattr(extension.moe, "AMXBF16_MOE", None) or extension.moe.AVX2BF16_MOE
        moe = kind(config)
        order_E = torch.arange(num_experts)
        pool.submit(moe.load_weights_task(order_E.data_ptr()))
        pool.sync()

    def call(h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        # Every tensor must live until the pool is done.
        count = torch.tensor([h_TD.shape[0]], dtype=torch.int32)
        ids_TK = ids_TK.contiguous()
        weights_TK = weights_TK.to(torch.float32).contiguous()
        out_TD = torch.empty_like(h_TD)
        pool.submit(
            moe.forward_task(
                count.data_ptr(),
                ids_TK.shape[1],
                ids_TK.data_ptr(),
                weights_TK.data_ptr(),
                h_TD.data_ptr(),
                out_TD.data_ptr(),
                False,
            )
        )
        pool.sync()
        return out_TD

    # The mask is read at every call.
    call.keep = (config, on_gpu_E)  # type: ignore[attr-defined]
    return call


@functools.cache
def _kt_pool(threads: int) -> Any:
    """Make kt-kernel's pool of threads, one for the process."""
    import kt_kernel

    # Its pool says goodbye on stdout when the process ends.
    atexit.register(_end_stdout)
    config = kt_kernel.kt_kernel_ext.WorkerPoolConfig()
    config.subpool_count = 1
    config.subpool_numa_map = [0]
    config.subpool_thread_count = [threads]
    return kt_kernel.kt_kernel_ext.CPUInfer(config)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Keep what a C++ library prints away from the result."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        # What C buffered must leave before the descriptor is stdout again.
        ctypes.CDLL(None).fflush(None)
        os.dup2(saved, 1)
        os.close(saved)


def _end_stdout() -> None:
    sys.stdout.flush()
    os.dup2(2, 1)
