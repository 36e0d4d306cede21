"""Prompts into ids, and ids into answers."""

from types import SimpleNamespace

import pytest

import dkv
from dkv.models.export import save_tokenizer
from dkv.tools.text import answer, encode

ALPHABET, EOS, MASK = "0123456789+-= ", 14, 15
SPEC = SimpleNamespace(vocab_size=16, eos_token_id=EOS, mask_token_id=MASK)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, ALPHABET, EOS, MASK)
    return dkv.load_tokenizer(folder)


def test_prompts_are_padded_on_the_left(tokenizer):
    ids, mask = encode(tokenizer, ["1+1=", "2=", ""])
    assert ids.tolist() == [[1, 10, 1, 12], [0, 0, 2, 12], [0, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]


def test_an_empty_prompt_has_no_columns(tokenizer):
    assert [t.shape for t in encode(tokenizer, [""])] == [(1, 0), (1, 0)]


def test_unknown_characters_are_named(tokenizer):
    with pytest.raises(ValueError, match=r"no token for 'a', '\\n'; it knows the characters ' \+-0123456789='$"):
        encode(tokenizer, ["1<|mdm_mask|>", "1a\na"])


def test_chat_needs_a_template(tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        encode(tokenizer, ["1+1="], chat=True)


def test_answers_end_at_the_end_of_tokenizer_or_model(tokenizer):
    assert answer(tokenizer, SPEC, [1, MASK, 2, EOS, 3]) == "12"
    assert answer(tokenizer, SPEC, [1, MASK, 2, EOS, 3], raw=True) == "1<|mdm_mask|>2<|endoftext|>3"
    assert answer(tokenizer, SimpleNamespace(eos_token_id=2), [1, 2, EOS]) == "1"
    assert answer(tokenizer, SimpleNamespace(eos_token_id=None), []) == ""
