"""Every registered partition keeps the promises of the family."""

import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch

from moesaic._errors import InputError
from moesaic.conversion.partition._base import COLLECTORS
from moesaic.conversion.partition._table import PARTITIONS

from .planted import blocks, random_source

SIZES = [(24, 4), (35, 5), (63, 7), (12, 1), (12, 12), (1, 1), (2, 2)]


def order(name, source, **settings):
    return PARTITIONS.load(name)(source, PARTITIONS.load_config(name)(**settings))


@pytest.fixture(params=list(PARTITIONS))
def name(request):
    for ability in PARTITIONS[request.param].abilities:
        if ability.startswith("package:"):
            pytest.importorskip(ability.removeprefix("package:"))
    return request.param


def collectors_of(name):
    needs = {a.removeprefix("needs:") for a in PARTITIONS[name].abilities if a[:6] == "needs:"}
    return needs - {"weights"}


@pytest.mark.parametrize(("num_neurons", "num_experts"), SIZES, ids=lambda v: str(v))
def test_is_an_exact_permutation_into_equal_blocks(name, num_neurons, num_experts):
    permutation_F = order(name, random_source(num_neurons, num_experts))
    assert permutation_F.dtype == torch.int64
    assert permutation_F.device.type == "cpu"
    assert sorted(permutation_F.tolist()) == list(range(num_neurons))
    assert {len(b) for b in blocks(permutation_F, num_experts)} == {num_neurons // num_experts}


def test_same_input_same_answer_and_input_untouched(name):
    source = random_source(48, 6)
    before = {key: value.clone() for key, value in source.stats.items()}
    up_FD = source.up_FD.clone()
    first_F, second_F = order(name, source), order(name, source)
    assert torch.equal(first_F, second_F)
    assert torch.equal(source.up_FD, up_FD)
    assert all(torch.equal(source.stats[key], value) for key, value in before.items())


def test_the_global_random_state_is_neither_read_nor_changed(name):
    source = random_source(48, 6)
    torch.manual_seed(1)
    first_F = order(name, source)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second_F = order(name, source)
    torch.manual_seed(1)
    assert torch.equal(first_F, second_F)
    assert torch.equal(state, torch.get_rng_state())


def test_precision_of_the_input_does_not_matter(name):
    source = random_source(48, 6)
    double = dataclasses.replace(
        source,
        up_FD=source.up_FD.double(),
        gate_FD=source.gate_FD.double(),
        stats={key: value.double() for key, value in source.stats.items()},
    )
    assert torch.equal(order(name, source), order(name, double))


def test_the_seed_matters_only_where_it_is_declared(name):
    first, second = random_source(48, 6), dataclasses.replace(random_source(48, 6), seed=1)
    differs = not torch.equal(order(name, first), order(name, second))
    if "seeded" in PARTITIONS[name].abilities:
        assert differs
    elif name in ("contiguous", "importance"):
        assert not differs


def test_blocks_that_are_to_be_shared_come_first(name):
    if name == "importance-by-domain":
        return
    source = random_source(48, 6)
    shared = dataclasses.replace(source, num_shared=2)
    assert torch.equal(order(name, shared), order(name, source))


def test_missing_statistics_name_the_collector(name):
    source = dataclasses.replace(random_source(24, 4), stats={})
    if needed := collectors_of(name):
        named = "|".join(needed)
        with pytest.raises(InputError, match=rf"needs the statistic \w+.*'({named})'"):
            order(name, source)
    else:
        order(name, source)


def test_statistics_that_are_not_finite_are_refused(name):
    source = random_source(24, 4)
    for stat in COLLECTORS:
        source.stats[stat][3] = torch.nan
    if collectors_of(name):
        with pytest.raises(InputError, match=r"has values that are not finite"):
            order(name, source)
    else:
        order(name, source)


def test_weights_are_needed_only_where_declared(name):
    bare = dataclasses.replace(random_source(24, 4), up_FD=None, gate_FD=None)
    if "needs:weights" in PARTITIONS[name].abilities:
        with pytest.raises(InputError, match=r"needs the up matrix"):
            order(name, bare)
    else:
        order(name, bare)


def test_half_precision_weights_are_accepted(name):
    source = random_source(24, 4)
    half = dataclasses.replace(
        source, up_FD=source.up_FD.bfloat16(), gate_FD=source.gate_FD.bfloat16()
    )
    assert sorted(order(name, half).tolist()) == list(range(24))


def test_record_is_complete(name):
    record = PARTITIONS[name]
    config = PARTITIONS.load_config(name)
    assert dataclasses.is_dataclass(config)
    assert config.__dataclass_params__.frozen
    assert len(record.summary) <= 80
    paper = record.paper.rpartition("arXiv:")[2]
    assert paper in (inspect.getmodule(PARTITIONS.load(name)).__doc__ or "")


def test_the_table_loads_without_torch():
    code = (
        "import sys; import moesaic.conversion.partition._table as t; "
        "assert len(t.PARTITIONS) >= 7; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
