import pytest
from evaluation_cases import Letters, convert, dense_model, make_blocks


@pytest.fixture
def blocks():
    return make_blocks({"docs": [1, 2, 1, 3], "code": [2, 1, 2]})


@pytest.fixture
def dense():
    return dense_model()


@pytest.fixture
def moe():
    return convert(dense_model())


@pytest.fixture
def tokenizer():
    return Letters()
