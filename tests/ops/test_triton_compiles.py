"""The kernels compile for GPUs, whether or not there is one, and their tiles fit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Hopper; 80 and 100 compile too.
CAPABILITY = 90


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed; pip install 'moesaic[dev]'",
)
def test_every_kernel_compiles_and_fits(tmp_path):
    # The interpreter is chosen when triton is imported, so this needs a process of its own.
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables["TRITON_CACHE_DIR"] = str(tmp_path)
    program = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(program), str(CAPABILITY)],
        capture_output=True,
        text=True,
        check=False,
        env=variables,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {kernel["kernel"] for kernel in found} == {
        "up_kernel",
        "product_kernel",
        "gather_sum_kernel",
        "down_backward_kernel",
        "matrix_gradient_kernel",
        "bias_gradient_kernel",
    }
    for kernel in found:
        # A tile whose end does not fit in registers is several times slower; a scalar may.
        assert kernel["stack_bytes"] <= 16, kernel
        # What small GPUs lend one program.
        assert kernel["shared_bytes"] <= 99 * 1024, kernel
