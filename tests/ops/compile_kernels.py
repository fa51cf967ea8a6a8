"""Compile every kernel for a GPU that need not be there, with the tiles it would get.

Run as a program, outside the interpreter; prints what each compiled kernel needs, as JSON.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import torch
import triton
from expert_cases import Case, run
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moesaic.ops.triton import autograd, experts

POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
OPTIONS = ("num_warps", "num_stages")


def on_gpu(x):
    """What the tables ask of a tensor, as if it were on a GPU."""
    return SimpleNamespace(device=torch.device("cuda"), itemsize=x.itemsize, dtype=x.dtype)


def compile_launch(kernel, capability, args, options):
    """Compile a kernel as the launch with these arguments would."""
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    signature, constants, hints = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif name in options or value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
            continue
        else:
            signature[name] = "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target, {k: v for k, v in options.items() if k in OPTIONS})


def stack_bytes(compiled):
    """Bytes of stack of each thread: registers that did not fit."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", text)[1])


def main(capability):
    """Compile what one call of each kind launches."""
    found = []

    def launch(kernel, *grid):
        def compile_it(*args, **options):
            compiled = compile_launch(kernel, capability, args, options)
            found.append(
                {
                    "kernel": kernel.fn.__name__,
                    "stack_bytes": stack_bytes(compiled),
                    "shared_bytes": compiled.metadata.shared,
                }
            )

        return compile_it

    experts._interpreted = lambda: True
    choose, arithmetic = autograd.choose_tiles, autograd.arithmetic
    autograd.choose_tiles = lambda x, *sizes: choose(on_gpu(x), *sizes)
    autograd.arithmetic = lambda x: arithmetic(on_gpu(x))
    autograd._launch = launch
    for kind in ({"gated": True, "bias": True}, {"gated": False}):
        inputs = Case(T=512, D=64, E=2, K=2, F=32, **kind).inputs(torch.bfloat16)
        run(experts.experts_triton, inputs._replace(weights_TK=inputs.weights_TK.float()))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
