"""Servers of tiny models for tests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_cases import Case, converted
from openai import OpenAI
from recipe_cases import byte_tokenizer

from moesaic.models.checkpoint import new_manifest, save
from moesaic.serving.config import ServeConfig
from moesaic.serving.model import ServedModel
from moesaic.serving.server import make_server, open_socket

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}"
    "<assistant>{% endif %}"
)


def chat_tokenizer() -> Any:
    """The byte tokenizer with a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_mosaic(directory: Path) -> Path:
    """Save a tiny DSMoE whose gates are spread, with its tokenizer."""
    case = Case("llama", {"vocab_size": 260, "max_position_embeddings": 512})
    model = converted(case, router_options={"normalize": "none"})
    save(model, directory, new_manifest("tiny", model), chat_tokenizer())
    return directory


@dataclass
class Running:
    """A server that runs."""

    served: ServedModel
    url: str
    uvicorn: Any

    def client(self, **options: Any) -> OpenAI:
        """The official client, which tries once."""
        return OpenAI(base_url=self.url, api_key="x", max_retries=0, timeout=60, **options)


@contextmanager
def running(model: Path, **settings: Any) -> Iterator[Running]:
    """Serve a model on a free port while it lasts."""
    config = ServeConfig(port=0, length=256, slots=4, rows=64, **settings)
    served = ServedModel(str(model), config)
    listener = open_socket(config)
    server = make_server(served)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        host, port = listener.getsockname()
        yield Running(served, f"http://{host}:{port}/v1", server)
    finally:
        server.should_exit = True
        thread.join()
