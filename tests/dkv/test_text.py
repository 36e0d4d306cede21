"""Prompts into ids, ids into answers, and tokenizers that do or do not load."""

import json
from types import SimpleNamespace

import pytest

from dkv.models.export import save_tokenizer
from dkv.text import answer, encode, load_tokenizer, vocab_limit

ALPHABET, EOS, MASK = "0123456789+-= ", 14, 15
SPEC = SimpleNamespace(vocab_size=16, eos_token_id=EOS, mask_token_id=MASK)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, ALPHABET, EOS, MASK)
    return load_tokenizer(str(folder), "llada")


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


def test_B22_ids_without_text_are_left_out(tokenizer):
    assert vocab_limit(tokenizer, SPEC) is None
    assert vocab_limit(tokenizer, SimpleNamespace(vocab_size=20)) == 16


def test_loading_is_quiet_and_restores_the_log_level(tokenizer, tmp_path, capfd):
    from transformers.utils import logging

    save_tokenizer(tmp_path, ALPHABET, EOS, MASK)
    (tmp_path / "config.json").write_text('{"model_type": "llada"}')
    level = logging.get_verbosity()
    load_tokenizer(str(tmp_path), "llada")
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == level


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "has no tokenizer: put its files"), ({"tokenizer.json": "{"}, "cannot read the tokenizer of")],
)
def test_a_tokenizer_that_is_missing_or_broken(tmp_path, files, message):
    (tmp_path / "config.json").write_text('{"model_type": "llada"}')
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(FileNotFoundError, match=message):
        load_tokenizer(str(tmp_path), "llada")


def test_dreams_tokenizer_loads_without_its_code(tmp_path):
    """The published folder has Qwen2's files, a class of its own, and that class's code."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary |= {"he": 256, "\u0120t": 257}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "DreamTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {str(258 + i): {"content": name, **token} for i, name in enumerate(special)},
        "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>", "bos_token": None,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>",
    }  # fmt: skip
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n\u0120 t\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "Dream"}')
    (tmp_path / "tokenization_dream.py").write_text("raise SystemExit('the code of the checkpoint ran')")

    tokenizer = load_tokenizer(str(tmp_path), "dream")
    ids, _ = encode(tokenizer, ["he the"], chat=True)
    assert ids.tolist() == [[259, 256, 257, 256, 260, 259]]
    assert tokenizer.decode(encode(tokenizer, ["h\u00e9 \u6f22"])[0][0]) == "h\u00e9 \u6f22"
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id) == (258, 261)
