"""`import moesaic` is quick, and transformers then loads what we saved, whoever came first."""

import importlib
import subprocess
import sys

import pytest
from model_cases import Case, converted

import moesaic
from moesaic import _autoload
from moesaic import models as models_package


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    converted(Case("llama", {})).save_pretrained(path)
    return path


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_needs_no_torch_and_is_quick():
    code = """
import sys, time
start = time.process_time()
import moesaic
print(time.process_time() - start, {"torch", "transformers", "numpy"} & set(sys.modules))
print(moesaic.__version__)
"""
    # Of three, the one that other processes disturbed least.
    seconds, heavy, version = min(run(code) for _ in range(3))
    assert float(seconds) < 0.05
    assert heavy == "set()"
    assert version == "0.1.0"


@pytest.mark.parametrize(
    "imports",
    [
        # A config class: its decorator imports the auto classes before the class exists.
        "import moesaic; from transformers import LlamaConfig",
        # The config table alone, without the models.
        "import moesaic; from transformers import AutoConfig",
        "import transformers; transformers.LlamaForCausalLM; import moesaic",
        # Our own modules may be what imports transformers.
        "import moesaic.models.auto",
    ],
)
def test_saved_model_loads_in_either_order(saved, imports):
    code = f"""
import sys
{imports}
from transformers import AutoConfig
print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
print(*[type(finder).__module__ for finder in sys.meta_path if "moesaic" in str(type(finder))])
"""
    assert run(code, saved) == ["MoesaicLlamaConfig", "MoesaicLlamaForCausalLM"]


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers; transformers.MixtralForCausalLM; import moesaic",
        # Nothing but our function: it does not wait for the auto classes.
        "import moesaic; from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS",
    ],
)
def test_our_experts_have_a_name_in_either_order(imports):
    code = f"""
import sys
{imports}
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
print(ALL_EXPERTS_FUNCTIONS["moesaic"].__module__)
from transformers import AutoModelForCausalLM, MixtralConfig
sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=4)
config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
model = AutoModelForCausalLM.from_config(config, experts_implementation="moesaic")
print(model.config._experts_implementation)
print(*[type(finder).__module__ for finder in sys.meta_path if "moesaic" in str(type(finder))])
"""
    assert run(code) == ["moesaic.models.experts_function", "moesaic"]


def test_configs_alone_do_not_import_the_experts_of_transformers():
    code = """
import sys
import moesaic
from transformers import AutoConfig
print("transformers.integrations.moe" in sys.modules)
print(sum("moesaic" in str(type(finder)) for finder in sys.meta_path))
"""
    # The finder of the experts still waits.
    assert run(code) == ["False", "1"]


def test_waiting_ends_with_the_awaited_module(monkeypatch, tmp_path):
    """The finder acts once, leaves, and the module does not show that it was there."""
    (tmp_path / "awaited_here.py").write_text("LOADED = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(_autoload, "_AWAITED", {"awaited_here": "ours"})
    calls = []
    monkeypatch.setattr(_autoload, "_register", lambda name: calls.append(name in sys.modules))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = list(sys.meta_path)
    _autoload.install()
    _autoload.install()
    assert len(sys.meta_path) == len(before) + 1
    assert not calls
    module = importlib.import_module("awaited_here")
    assert module.LOADED
    assert calls == [True]
    assert sys.meta_path == before
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    assert module.__spec__.loader is module.__loader__
    _autoload.install()
    assert calls == [True, True]
    monkeypatch.delitem(sys.modules, "awaited_here")


def test_waiting_for_a_module_that_is_not_there(monkeypatch):
    monkeypatch.setattr(_autoload, "_AWAITED", {"no_such_module_here": "ours"})
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    _autoload.install()
    with pytest.raises(ModuleNotFoundError, match="no_such_module_here"):
        importlib.import_module("no_such_module_here")


@pytest.mark.parametrize("package", [moesaic, models_package], ids=lambda p: p.__name__)
def test_public_names(package):
    assert set(package._HOMES) == set(package.__all__) - {"__version__"}
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_public_names_are_listed():
    assert dir(moesaic) == sorted(moesaic.__all__)
