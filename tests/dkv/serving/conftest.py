"""The bundled model behind a server."""

import copy

import pytest

import dkv


@pytest.fixture(scope="session")
def tiny():
    return dkv.load("tiny", device="cpu"), dkv.load_tokenizer("tiny")


@pytest.fixture(scope="session")
def talking(tiny):
    """`tiny` with a template that joins what is said."""
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tiny[0], tokenizer
