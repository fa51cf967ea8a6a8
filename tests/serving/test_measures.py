"""What the server measures: the experts of every layer, and the curve of thresholds."""

import urllib.request

import pytest
import torch
from model_cases import Case, converted, random_ids
from prometheus_client.parser import text_string_to_metric_families
from serving_cases import chat_tokenizer, running

from moesaic._errors import InputError
from moesaic.inference import PlainDecoder
from moesaic.inference.activity import ActiveShare
from moesaic.inference.batching import Step
from moesaic.models.checkpoint import load
from moesaic.models.ffn import dense_ffn_width
from moesaic.nn.layer import moe_layers, record_routing
from moesaic.nn.operating_point import threshold_at
from moesaic.nn.shape import layer_shapes
from moesaic.serving.metrics import ActiveExperts
from moesaic.serving.operating import OperatingCurve, measure_curve
from moesaic.training.budget import active_fraction

LLAMA = Case("llama", {})


def read_metrics(server):
    text = urllib.request.urlopen(server.url.removesuffix("/v1") + "/metrics").read().decode()
    families = text_string_to_metric_families(text)
    return {
        (s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples
    }


def test_metrics_are_what_the_model_did(mosaic):
    model, tokenizer = load(mosaic), chat_tokenizer()
    with running(mosaic) as server, server.client() as client:
        answer = client.completions.create(model="mosaic", prompt="abcdef", temperature=0)
        found = read_metrics(server)
    prompt = tokenizer("abcdef")["input_ids"]
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
    )
    with torch.no_grad(), record_routing(model) as routings:
        model(out[:, :-1])
    for layer, routing in enumerate(routings):
        count_T = routing.active_T()
        label = ("layer", str(layer))
        assert found["moesaic_active_experts_sum", label] == count_T.sum()
        assert found["moesaic_active_experts_count", label] == 21
        for most in range(5):
            bucket = ("moesaic_active_experts_bucket", label, ("le", f"{most}.0"))
            assert found[bucket] == (count_T <= most).sum()
    assert found["moesaic_prompt_tokens_total",] == 6
    assert found["moesaic_new_tokens_total",] == 16
    assert found["moesaic_tokens_total",] == 21
    shapes = layer_shapes(model, dense_ffn_width(model.config))
    mean = sum(active_fraction(routings, shapes)) / len(shapes)
    assert found["moesaic_active_ffn_sum_total",] / 21 == pytest.approx(mean)
    assert answer.moesaic["active_ffn"] == pytest.approx(mean, abs=1e-4)
    label = (("path", "/v1/completions"), ("status", "200"))
    assert found["moesaic_requests_total", *label] == 1
    assert found["moesaic_request_seconds_count",] == 1
    assert found["moesaic_first_token_seconds_count",] == 1


def test_wide_layers_have_few_buckets():
    counting = ActiveExperts({3: 200})
    used_LTE = torch.zeros(4, 3, 200, dtype=torch.uint8)
    used_LTE[3, 1, :200] = 1
    used_LTE[3, 2, :30] = 1
    step = Step(written=[], keys=[0, 0, 0], used_LTE=used_LTE, prompt_rows=3)
    counting.observe(step)
    counting.observe(step)
    (family,) = counting.collect()
    samples = {s.labels.get("le", s.name): s.value for s in family.samples}
    assert len(samples) == 20
    assert samples["0.0"] == samples["25.0"] == 2
    assert samples["38.0"] == 4
    assert samples["200.0"] == samples["+Inf"] == 6
    assert samples["moesaic_active_experts_sum"] == 460


@pytest.mark.parametrize(
    "options", [{}, {"shared_width": 16}, {"bypass_rank": 4}], ids=["plain", "shared", "bypass"]
)
def test_the_curve_meets_a_fraction_on_its_text(options):
    model = converted(LLAMA, router_options={"normalize": "none"}, **options)
    share = ActiveShare(model)
    ids = random_ids(1, 40)[0]
    curve = measure_curve(PlainDecoder(model, length=64), share, ids.tolist(), most=40)
    shapes = layer_shapes(model, dense_ffn_width(model.config))
    for active in (0.9, 0.6):
        threshold = curve.threshold(active)
        with torch.no_grad(), threshold_at(model, threshold), record_routing(model) as routings:
            model(ids.unsqueeze(0))
        fractions = active_fraction(routings, shapes)
        assert sum(fractions) / len(fractions) == pytest.approx(active, abs=0.04)
    assert [layer.router.threshold for layer in moe_layers(model)] == [0.5, 0.5]


def test_a_curve_reads_between_its_points():
    # Of the two in the middle the later is higher, as later layers can make it.
    curve = OperatingCurve([0.0, 0.4, 0.6, 0.8], [1.0, 0.5, 0.55, 0.3])
    assert curve.threshold(1.0) == 0.0
    assert curve.threshold(0.75) == pytest.approx(0.2)
    assert curve.threshold(0.4) == pytest.approx(0.7)
    assert curve.threshold(0.3) == pytest.approx(0.8)
    for active in (0.29, 1.01):
        with pytest.raises(InputError, match=r"active must be in \[0.300, 1\] for this model, got"):
            curve.threshold(active)
