"""What every test needs: one thread, no network, no chatter."""

import os

# Set before transformers is imported: a test that reaches for the network must fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Set before triton is imported: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples in every run: what passes here passes elsewhere.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

_IGNORED = [
    # triton 3.9 says, at the first compilation, that 3.10 will change a default.
    "ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning",
    # peft 0.21 reads the old name of transformers' property whenever it wraps a model.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
]


def pytest_configure(config: pytest.Config) -> None:
    for line in _IGNORED:
        config.addinivalue_line("filterwarnings", line)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs vLLM where it is absent, unless the environment says where it must be."""
    if item.get_closest_marker("vllm") is None:
        return
    from moesaic.serving.vllm.process import VARIABLE, why_not

    if why := why_not():
        say = pytest.fail if os.environ.get(VARIABLE) else pytest.skip
        say(f"vLLM is {why}")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    # On tensors this small, threads wait for each other.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
