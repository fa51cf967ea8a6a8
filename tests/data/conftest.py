"""A byte tokenizer and small texts that tell their documents apart."""

import pytest


class ByteTokenizer:
    """Ids are bytes; 256 ends a document."""

    eos_token_id = 256

    def __call__(self, text, *, add_special_tokens):
        assert add_special_tokens is False
        return {"input_ids": list(text.encode())}

    @staticmethod
    def decode(ids):
        return bytes(int(i) for i in ids if i != 256).decode()


@pytest.fixture
def tokenizer():
    return ByteTokenizer()


@pytest.fixture
def corpus(tmp_path):
    """A folder of 40 different documents of about 400 characters."""
    folder = tmp_path / "tales"
    folder.mkdir()
    for number in range(40):
        words = " ".join(f"w{number}x{word}" for word in range(55))
        (folder / f"{number:02}.txt").write_text(words, "utf-8")
    return folder
