"""`vllm serve` on loopback, asked by the official client: the tokens that our engine writes."""

from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from model_cases import random_ids
from openai import OpenAI
from serving_cases import chat_tokenizer
from vllm_cases import GATES, NEW_TOKENS, mosaic, ours

from moesaic.evaluation.bench.servers import running
from moesaic.models.checkpoint import new_manifest, save
from moesaic.serving.vllm.process import environment, serve_command

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def write(client, ids):
    """Greedy tokens after a prompt, as a stream, and the text that came with them."""
    ask = {"max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}
    extra = {"ignore_eos": True, "return_token_ids": True}
    chunks = client.completions.create(model="tiles", prompt=ids, **ask, extra_body=extra)
    choices = [chunk.choices[0] for chunk in chunks]
    return [token for choice in choices for token in choice.token_ids], choices[-1].finish_reason


def test_it_serves_a_checkpoint_as_it_is_and_ends_when_told(tmp_path):
    model = mosaic("llama", GATES, {"bypass_rank": 4, "shared_width": 32}, vocab_size=260)
    save(model, tmp_path / "mosaic", new_manifest("none", model), chat_tokenizer())
    prompts = random_ids(4, 9).tolist()
    want, _ = ours(model, prompts)

    def command(port):
        return serve_command(tmp_path / "mosaic", port, name="tiles", dtype="float32", length=64)

    log = tmp_path / "log"
    with running(command, log, name="vllm serve", environment=environment(1)) as server:
        with OpenAI(base_url=f"{server.address}/v1", api_key="x", max_retries=0) as client:
            (card,) = client.models.list().data
            assert card.id == "tiles"
            with ThreadPoolExecutor(len(prompts)) as pool:
                found = list(pool.map(lambda ids: write(client, ids), prompts))
            assert found == [(tokens, "length") for tokens in want]
            messages = [{"role": "user", "content": "Hello"}]
            answer = client.chat.completions.create(
                model="tiles", messages=messages, max_tokens=3, temperature=0
            )
            assert answer.usage.completion_tokens == 3
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert family
        server.process.terminate()
        assert server.process.wait(60) == 0, log.read_text()
        assert psutil.wait_procs(family, timeout=60)[1] == []
    assert "MoesaicLlamaForCausalLM" in log.read_text()
