"""`moesaic.convert` finds the conversion by its settings and measures what they need."""

import pytest
from calibration_cases import LLAMA, make_text
from model_cases import dense_model, random_ids, same_state
from recipe_cases import write_model

import moesaic as mo
from moesaic._errors import InputError
from moesaic.nn.layer import moe_layers

CALIBRATION = mo.CalibrationConfig(tokens=96)


def test_convert_measures_what_it_needs():
    config = mo.DSMoE(experts=4, active=0.5, fit_steps=2)
    models = [
        mo.convert(dense_model(LLAMA), config, text=make_text(), calibration=CALIBRATION)
        for _ in range(2)
    ]
    same_state(*models)
    assert len(moe_layers(models[0])) == 2
    assert models[0](random_ids()).logits.isfinite().all()


def test_convert_from_a_directory_needs_no_text(tmp_path):
    source = str(write_model(tmp_path / "dense"))
    few = mo.CalibrationConfig(tokens=512)
    model = mo.convert(source, mo.DSMoE(experts=4, fit_steps=2), calibration=few)
    assert model.config.moesaic["layers"][0]["num_experts"] == 4


def test_what_convert_cannot_do():
    with pytest.raises(InputError, match="give text"):
        mo.convert(dense_model(LLAMA), mo.DSMoE(experts=4))
    with pytest.raises(InputError, match=r"settings of a conversion \(.*dsmoe.*\), got dict"):
        mo.convert(dense_model(LLAMA), {})
