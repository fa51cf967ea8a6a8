"""Requests drawn from the server's own schema, right and wrong ones: none is answered with 5xx."""

import pytest
from hypothesis import HealthCheck, given, settings
from serving_cases import running

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is in the extra dev")


@pytest.mark.slow
def test_nothing_from_the_schema_is_answered_with_5xx(mosaic):
    statuses = []
    with running(mosaic, max_tokens=8) as server:
        root = server.url.removesuffix("/v1")
        schema = schemathesis.openapi.from_url(f"{root}/openapi.json")
        for operation in schema.get_all_operations():
            statuses += fuzz(operation.ok())
        assert server.served.worker.alive
    assert max(statuses) < 500
    assert {200, 400, 404} <= set(statuses)
    assert len(statuses) > 80


def fuzz(operation):
    """The statuses of answers to drawn requests."""
    statuses = []

    def send(case):
        # With another name for the model nothing else would be looked at.
        if isinstance(case.body, dict) and len(statuses) % 4:
            case.body["model"] = "mosaic"
            case.body.pop("max_tokens", None)
        statuses.append(case.call(timeout=60).status_code)

    modes = [schemathesis.GenerationMode.POSITIVE]
    # Any text is a name, so without a body nothing can be wrong.
    if operation.body:
        modes.append(schemathesis.GenerationMode.NEGATIVE)
    drawn = settings(
        max_examples=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    for mode in modes:
        drawn(given(operation.as_strategy(generation_mode=mode))(send))()
    return statuses
