"""What a compression says that it leaves active is what an evaluation measures."""

import pytest
from compression_cases import make_text, measure, weights_in_use
from model_cases import Case, dense_model

from moesaic.compression._table import COMPRESSIONS
from moesaic.evaluation import evaluate_perplexity, model_cost

LLAMA, PLAIN = Case("llama", {}), Case("opt", {"activation_function": "gelu"})
FROM_DENSE = [name for name, row in COMPRESSIONS.items() if "mixture" not in row.abilities]
# What refuses some architectures, the contract holds to its refusal.
CASES = [(name, LLAMA) for name in FROM_DENSE] + [
    (name, PLAIN) for name, row in COMPRESSIONS.items() if "any-architecture" in row.abilities
]


@pytest.mark.parametrize(("name", "case"), CASES, ids=str)
def test_reported_fraction_is_measured(name, case, tmp_path):
    config = COMPRESSIONS.load_config(name)()
    text = make_text(num_blocks=16)
    dense = dense_model(case)
    whole, before = model_cost(dense), weights_in_use(dense)
    stats = measure(dense, tmp_path, config.collectors(), text)
    model, results = COMPRESSIONS.load(name)(dense, stats, config)
    activation = evaluate_perplexity(model, text).activation
    if activation is None:
        # An ordinary dense model again, smaller.
        assert weights_in_use(model) / before == pytest.approx(results["active"])
        return
    # A method that reads activations was set on those of the dense model.
    assert activation.mean() == pytest.approx(results["active"], abs=0.02)
    assert results["active"] == pytest.approx(config.active, abs=0.04)
    cost = model_cost(model, activation.mean_per_layer())
    assert cost.active_ffn_fraction == pytest.approx(activation.mean())
    assert cost.active_parameters < whole.active_parameters
    assert cost.flops_per_token < whole.flops_per_token
    assert cost.router_parameters == 0
