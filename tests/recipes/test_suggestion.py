"""Advice before work: what it reads, what it predicts, what it says, and what it leaves."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from recipe_cases import byte_tokenizer, write_model, write_text
from transformers import AutoModelForCausalLM

import moesaic as mo
from moesaic._errors import InputError
from moesaic.analysis import Comparison, check_sentence, checks, predictions_markdown
from moesaic.conversion.cmoe import CMoE
from moesaic.conversion.dsmoe import DSMoE
from moesaic.data import DataConfig, TokenBlocks, prepare
from moesaic.models.checkpoint import load_dense
from moesaic.recipes.comparison import (
    all_cells,
    build_protocol,
    compare,
    write_comparison,
)
from moesaic.recipes.comparison.process import do_piece
from moesaic.recipes.suggestion import TrialConfig, suggest_cells
from moesaic.recipes.suggestion.reading import Reading, unseen_blocks
from moesaic.recipes.suggestion.run import checked_budgets, predict, thresholded
from moesaic.recipes.suggestion.trials import Fitted, Parent, Placed, Trial

TRIALS = TrialConfig(first_blocks=4, most_blocks=16, fit_steps=3, fit_tokens=512)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny model whose networks alone learnt its text, so that what they lose is seen."""
    root = tmp_path_factory.mktemp("suggestion")
    write_model(root / "dense")
    write_text(root / "text")
    model = AutoModelForCausalLM.from_pretrained(root / "dense")
    text = split(root).train
    networks = [p for name, p in model.named_parameters() if ".mlp." in name]
    optimizer = torch.optim.Adam(networks, lr=3e-3)
    for step in range(60):
        ids_BS = torch.from_numpy(text.take(16, seed=step).ids_NS).long()
        optimizer.zero_grad()
        model(input_ids=ids_BS, labels=ids_BS).loss.backward()
        optimizer.step()
    model.save_pretrained(root / "dense")
    return root


def split(root):
    config = DataConfig(sources=(f"notes={root / 'text'}",), block=32)
    return prepare(config, byte_tokenizer())


def protocol(root, **options):
    return build_protocol(
        {
            "model": str(root / "dense"),
            "data": {"sources": [f"notes={root / 'text'}"], "block": 32},
            "calibration": {"tokens": 1024},
            "heldout": {"blocks_per_domain": 64},
            "budgets": [0.75, 0.5, 0.25],
            "seeds": [0],
            "trained": [False],
            "methods": {
                "dsmoe": {"convert": "dsmoe", "options": {"experts": 8, "fit_steps": 20}},
                "flap": {"compress": "flap", "options": {"multiple": 1}},
                "teal": {"compress": "teal"},
                # Measured, and no method to be predicted.
                "neurons": {"bound": "neuron-bound"},
            },
        }
        | options
    )


def test_predictions_hold(root, tmp_path):
    """At least 80% of the cells within 15% of what `compare` measures at full size."""
    of = protocol(root)
    compare(of, tmp_path / "out", run=lambda piece, log, bar: do_piece(piece, bar))
    suggest_cells(of, tmp_path / "out", all_cells(of), TRIALS)
    comparison, files = write_comparison(of, tmp_path / "out")
    found = checks(comparison)
    assert len(found) == 9
    # Not only models that lose nothing.
    assert max(check.measured for check in found) > 1.3
    assert sum(abs(check.off) <= 0.15 for check in found) >= 8, found
    assert check_sentence(found) in Path(files["markdown"]).read_text()
    # The order of methods is that of what is measured, wherever they are 20% apart.
    for a in found:
        for b in found:
            if a.budget == b.budget and a.measured > 1.2 * b.measured:
                assert a.predicted > b.predicted


def test_cells_are_predicted_in_parts(root, tmp_path):
    of = protocol(root, budgets=[0.5], methods={"flap": {"compress": "flap"}})
    wide = protocol(root, budgets=[0.5, 0.3], methods={"flap": {"compress": "flap"}})
    few = TrialConfig(first_blocks=1, most_blocks=1)
    assert [p.budget for p in suggest_cells(of, tmp_path, all_cells(of), few)] == [0.5]
    with pytest.raises(InputError, match="of methods without training, and none is selected"):
        suggest_cells(of, tmp_path, [replace(cell, trained=True) for cell in all_cells(of)])
    both = suggest_cells(wide, tmp_path, all_cells(wide)[1:], few)
    assert [p.budget for p in both] == [0.5, 0.3]


def test_predictions_go_on_after_an_interruption(root, tmp_path, monkeypatch):
    """What was predicted is kept, and predicted again where it is of other settings or trials."""
    few = TrialConfig(first_blocks=1, most_blocks=1)
    told = []

    def budgets_read(of, trials=few, **options):
        told.clear()
        found = suggest_cells(of, tmp_path, all_cells(of), trials, **options)
        return [p.budget for p in found], told.copy()

    measure = Reading.measure

    def measured(self, model, name, **options):
        told.append(float(name.rpartition(" ")[2]))
        if told[-1] == stop:
            raise KeyboardInterrupt
        return measure(self, model, name, **options)

    monkeypatch.setattr(Reading, "measure", measured)
    of = protocol(root, methods={"flap": {"compress": "flap", "options": {"multiple": 1}}})
    stop = 0.25
    with pytest.raises(KeyboardInterrupt):
        budgets_read(of)
    stop = None
    assert budgets_read(of) == ([0.75, 0.5, 0.25], [0.25])
    assert budgets_read(of) == ([0.75, 0.5, 0.25], [])
    assert budgets_read(of, redo=True) == ([0.75, 0.5, 0.25], [0.75, 0.5, 0.25])
    other = replace(few, most_blocks=2)
    assert budgets_read(of, other) == ([0.75, 0.5, 0.25], [0.75, 0.5, 0.25])
    changed = protocol(root, methods={"flap": {"compress": "flap", "options": {"multiple": 2}}})
    assert not write_comparison(changed, tmp_path)[0].predictions
    assert budgets_read(changed, other) == ([0.75, 0.5, 0.25], [0.75, 0.5, 0.25])
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert all(json.loads(line)["versions"]["commit"] for line in lines)


def test_what_is_suggested(root):
    dense = load_dense(str(root / "dense"))
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    suggestion = mo.suggest(
        dense,
        DSMoE(experts=8, fit_steps=3),
        budgets=(0.5, 0.75),
        text=split(root).train,
        calibration=mo.CalibrationConfig(tokens=256),
        trials=TrialConfig(first_blocks=2, most_blocks=2),
    )
    assert suggestion.budgets == (0.75, 0.5)
    assert [(p.method, p.budget) for p in suggestion.predictions] == [
        (method, budget)
        for method in (
            "dsmoe",
            "dsmoe-thresholds",
            "flap",
            "wanda",
            "teal",
            "neuron-bound",
            "block-bound",
        )
        for budget in (0.75, 0.5)
    ]
    by_cell = {(p.method, p.budget): p for p in suggestion.predictions}
    for budget in suggestion.budgets:
        # A bound knows the outputs; on so little text it may still be a little worse.
        assert by_cell["block-bound", budget].loss < by_cell["dsmoe", budget].loss + 0.02
        assert abs(by_cell["dsmoe-thresholds", budget].active - budget) < 0.02
        assert abs(by_cell["neuron-bound", budget].active - budget) < 0.02
        assert by_cell["flap", budget].static
    # The parent is as it was: its weights, and no hook that cuts neurons.
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    assert not any(module._forward_pre_hooks for module in dense.modules())


def test_thresholds_are_suggested_where_there_are_none_and_can_be():
    plain = DSMoE(experts=8)
    assert thresholded(plain) == replace(plain, kept=None, inputs=None)
    for other in (
        replace(plain, kept=0.8),
        replace(plain, compensate=True),
        replace(plain, init="open"),
        CMoE(experts=4),
    ):
        assert thresholded(other) is None


def test_a_method_that_refuses_a_budget_says_why(root):
    suggestion = mo.suggest(
        str(root / "dense"),
        CMoE(experts=4, active=0.75),
        budgets=(0.75, 0.6),
        text=split(root).train,
        calibration=mo.CalibrationConfig(tokens=256),
        trials=TrialConfig(first_blocks=1, most_blocks=1),
    )
    first, second = (p for p in suggestion.predictions if p.method == "cmoe")
    assert first.ratio is not None
    assert second.ratio is None
    assert "active" in second.reason
    assert second.text() == "-"
    assert "block-bound" not in {p.method for p in suggestion.predictions}


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("bypass", [0, 4])
def test_one_fit_settles_on_one_budget_after_the_other(root, tmp_path, bypass, refit):
    """The second time at a budget gives what the first gave, whatever was between."""
    dense = load_dense(str(root / "dense"))
    config = DSMoE(experts=8, fit_steps=3, active=0.5, bypass=bypass, refit=refit)
    stats = mo.calibrate(
        dense, split(root).train, config.collectors(), mo.CalibrationConfig(tokens=1024), tmp_path
    )
    fitted = Fitted(Parent(dense=dense, stats=stats, config=TRIALS), config)
    states = []
    for budget in (0.75, 0.5, 0.75):
        with fitted.at(budget) as placed:
            state = placed.model.state_dict()
            states.append({name: value.clone() for name, value in state.items()})
    first, other, again = states
    for name, value in first.items():
        torch.testing.assert_close(again[name], value)
    assert any(not torch.equal(other[name], value) for name, value in first.items())


def test_of_many_fits_two_stay(root, tmp_path):
    """Each holds a model."""
    dense = load_dense(str(root / "dense"))
    config = DSMoE(experts=8, fit_steps=1)
    stats = mo.calibrate(
        dense, split(root).train, config.collectors(), mo.CalibrationConfig(tokens=256), tmp_path
    )
    parent = Parent(dense=dense, stats=stats, config=TRIALS)
    first, second, third = (replace(config, experts=experts) for experts in (2, 4, 8))
    made = [parent.fitted(one) for one in (first, second, third)]
    assert [parent.fitted(one) for one in (second, third)] == made[1:]
    assert parent.fitted(first) is not made[0]


def test_a_short_fit_is_held_to_what_a_few_layers_lose_in_full(root, tmp_path):
    dense = load_dense(str(root / "dense"))
    config = DSMoE(experts=8, fit_steps=30, active=0.5)
    stats = mo.calibrate(
        dense, split(root).train, config.collectors(), mo.CalibrationConfig(tokens=2048), tmp_path
    )

    def in_full(**trials):
        parent = Parent(dense=dense, stats=stats, config=TrialConfig(**trials))
        with parent.fitted(config).at(0.5) as placed:
            return placed.in_full

    # A trial that is the method itself loses what that does, one of fewer tokens more.
    assert in_full(fit_steps=30, fit_tokens=2048) == pytest.approx(1.0, abs=1e-6)
    assert 0.3 < in_full(fit_steps=1, fit_tokens=128) < 0.95


def test_what_a_trial_loses_is_counted_as_in_full(root):
    dense = load_dense(str(root / "dense"))
    broken = load_dense(str(root / "dense"))
    with torch.no_grad():
        broken.lm_head.weight.mul_(0.5)
    reading = Reading(dense, split(root).train, 4, 0, TRIALS)

    def trial(in_full):
        return Trial(
            name="made",
            kind="convert",
            static=False,
            at=lambda budget: nullcontext(Placed(broken, active=budget, in_full=in_full)),
        )

    (whole,), (half,) = (predict([(trial(part), 0.5)], reading, dense) for part in (1.0, 0.5))
    assert whole.ratio > 1.1
    assert (half.low, half.ratio, half.high) == pytest.approx(
        (whole.low**0.5, whole.ratio**0.5, whole.high**0.5)
    )


def test_thinned_statistics_keep_means(root, tmp_path):
    stats = mo.calibrate(
        load_dense(str(root / "dense")),
        split(root).train,
        ("inputs", "neurons", "tokens"),
        mo.CalibrationConfig(tokens=256),
        tmp_path,
    )
    whole, thin = stats.layer(1), stats.thinned(16).layer(1)
    at = torch.linspace(0, 255, 16).long()
    assert torch.equal(thin["inputs.h_TD"], whole["inputs.h_TD"][at])
    assert torch.equal(thin["neurons.mean_F"], whole["neurons.mean_F"])
    ids_NS = stats.whole()["tokens.ids_NS"]
    assert torch.equal(stats.thinned(2 * ids_NS.shape[1]).whole()["tokens.ids_NS"], ids_NS[[0, -1]])
    assert torch.equal(stats.thinned(512).layer(1)["inputs.h_TD"], whole["inputs.h_TD"])


def blocks(documents, domains):
    return TokenBlocks(
        ids_NS=np.zeros((len(documents), 4), np.int32),
        domain_N=np.asarray(domains, np.int16),
        document_N=np.asarray(documents, np.int32),
        domains=("a", "b"),
    )


def test_blocks_that_calibration_did_not_see():
    # Block:     0  1  2  3  4  5  6  7  8  9
    documents = [0, 7, 0, 1, 1, 2, 7, 8, 9, 7]
    domains = [0, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    drawn = blocks(documents, domains)
    # Calibrated: 0 and 1, so documents 0 and 7. In domain a the others are 1 and 2, first blocks
    # of both before the second of 1; block 2, of document 0, comes last. In b 8 and 9 are new.
    rounds = unseen_blocks(drawn, 2, TrialConfig(first_blocks=1, most_blocks=4))
    assert [block_N.tolist() for block_N in rounds] == [[3, 7], [5, 8], [4, 2, 6, 9]]
    assert [b.tolist() for b in unseen_blocks(drawn, 2, TrialConfig(most_blocks=2))] == [
        [3, 5, 7, 8]
    ]
    with pytest.raises(InputError, match="calibration reads all 10 blocks of the text"):
        unseen_blocks(drawn, 10, TrialConfig())


def test_budgets_and_work_are_checked():
    assert checked_budgets([0.25, 0.75]) == (0.75, 0.25)
    for bad, message in (([], "distinct"), ([0.5, 0.5], "distinct"), ([1.0], "in .0, 1., got 1")):
        with pytest.raises(InputError, match=message):
            checked_budgets(bad)
    with pytest.raises(InputError, match="fit_steps must be at least 1, got 0"):
        TrialConfig(fit_steps=0)
    with pytest.raises(InputError, match="at least first_blocks=3, got 2"):
        TrialConfig(first_blocks=3, most_blocks=2)
    with pytest.raises(InputError, match="suggest reads text"):
        mo.suggest(torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="settings of a conversion"):
        mo.suggest("nowhere", mo.FLAP())


def test_nothing_measured_is_no_section():
    empty = Comparison(protocol={"budgets": [0.5], "methods": {}, "trained": [False]}, lines=[])
    assert predictions_markdown(empty) == ""
    assert json.dumps(check_sentence([])) == '"No predicted cell was measured yet."'
