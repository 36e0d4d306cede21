"""Tokenizers that do or do not load, and what the vocabulary of a folder says of a model's ids."""

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import dkv
from dkv.models import folders, load_tokenizer
from dkv.models.export import save_tokenizer
from dkv.models.tokenizer import with_vocab_limit
from dkv.tools.text import encode

ALPHABET, EOS, MASK = "0123456789+-= ", 14, 15
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]


def dream_files(folder, **changes):
    """The files of a published Dream folder: Qwen2's, a class of its own, and that class's code."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"he": 256, "\u0120t": 257}
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {str(258 + i): {"content": name, **token} for i, name in enumerate(SPECIAL)},
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "bos_token": None,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>",
    }
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\n\u0120 t\n", "utf-8")
    config = {name: value for name, value in {**config, **changes}.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text('{"model_type": "Dream", "auto_map": {"AutoModel": "modeling_dream.M"}}')
    for name in ("tokenization_dream.py", "modeling_dream.py"):
        (folder / name).write_text("raise SystemExit('the code of the checkpoint ran')")
    return folder


@pytest.mark.parametrize("name", ["tiny", "tiny-dream"])
def test_the_example_on_a_bundled_model(name):
    model, tokenizer = dkv.load(name, device="cpu"), dkv.load_tokenizer(name)
    ids = tokenizer("+2 -3 +1 +1 -2 +3 +1 -1 -1 +2 -3 +3 +1 +1 -2 -2 +1 +3 -1 -1 +2=", return_tensors="pt").input_ids
    output = dkv.generate(model, ids, max_new_tokens=64, cache=dkv.DecodeCache(refresh=8))
    text = tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    assert text == "52 49 50 51 49 52 53 52 51 53 50 53 54 55 53 51 52 55 54 53 55"
    assert model.spec.vocab_limit is None and len(tokenizer) == model.spec.vocab_size


def test_a_llada_folder_with_code_neither_asks_nor_runs_it(tmp_path, monkeypatch, capfd):
    save_tokenizer(tmp_path, ALPHABET, EOS, MASK)
    auto = {"AutoConfig": "code.C", "AutoModel": "code.M", "AutoTokenizer": ["code.T", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llada", "auto_map": auto}))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "auto_map": auto}))
    (tmp_path / "code.py").write_text("raise SystemExit('the code of the checkpoint ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    for options in ({}, {"trust_remote_code": True}):
        assert load_tokenizer(tmp_path, **options)("1+1=").input_ids == [1, 10, 1, 12]
    assert capfd.readouterr() == ("", "")


def test_loading_restores_the_log_level(tmp_path):
    from transformers.utils import logging

    save_tokenizer(tmp_path, ALPHABET, EOS, MASK)
    level = logging.get_verbosity()
    load_tokenizer(tmp_path)
    assert logging.get_verbosity() == level


def test_dreams_tokenizer_loads_without_its_code(tmp_path):
    tokenizer = load_tokenizer(dream_files(tmp_path))
    ids, _ = encode(tokenizer, ["he the"], chat=True)
    assert ids.tolist() == [[259, 256, 257, 256, 260, 259]]
    assert tokenizer.decode(encode(tokenizer, ["h\u00e9 \u6f22"])[0][0]) == "h\u00e9 \u6f22"
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id) == (258, 261)


@pytest.mark.parametrize("model_type", ["Dream", "llada", "unheard-of"])
def test_a_tokenizer_json_is_taken_as_it_stands(tmp_path, model_type):
    """Even if the folder names a class of transformers, which would split the text by rules of its own."""
    vocabulary = {"a": 0, "b": 1, "a b": 2, "<|endoftext|>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for named in ("DreamTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast", None):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named} if named else {}))
        assert load_tokenizer(tmp_path)("a b|b").input_ids == [2, 1], named


def test_a_dream_folder_with_the_files_of_another_class(tmp_path):
    dream_files(tmp_path, tokenizer_class="GPT2Tokenizer", auto_map=None)
    assert type(load_tokenizer(tmp_path)).__name__.startswith("GPT2")
    dream_files(tmp_path, tokenizer_class="UnheardOfTokenizer", auto_map=None)
    with pytest.raises(ValueError, match=r"transformers cannot read the tokenizer of .* \(vocab.json, merges.txt"):
        load_tokenizer(tmp_path)


LLADA, DREAM = '{"model_type": "llada"}', '{"model_type": "Dream"}'
INCOMPLETE = [
    ({"config.json": LLADA}, "has no tokenizer: put its files, tokenizer.json or"),
    ({"config.json": DREAM}, "has no tokenizer: put its files, tokenizer.json or"),
    ({"config.json": DREAM, "tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}'}, "has no tokenizer"),
    ({"config.json": DREAM, "vocab.json": '{"a": 0}'}, "merges.txt is missing, without which vocab.json means nothing"),
    ({"config.json": DREAM, "merges.txt": "a b\n"}, "vocab.json is missing, without which merges.txt means nothing"),
]


@pytest.mark.parametrize(("files", "message"), INCOMPLETE, ids=[" ".join(f) for f, _ in INCOMPLETE])
def test_a_tokenizer_that_is_not_complete(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(FileNotFoundError, match=message):
        load_tokenizer(tmp_path)


DAMAGED = [
    ("tokenizer.json", "{}", r"cannot read the tokenizer of .*\(tokenizer.json"),
    ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', r"\(tokenizer.json"),
    ("tokenizer.json", '{"model": {"type": "WordLevel", "vocab": {}, "unk_token": "a"}}', "tokenizer"),
    ("tokenizer_config.json", '{"added_tokens_decoder": 5}', r"\(vocab.json, merges.txt, tokenizer_config.json"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}', "tokenizer_config.json"),
    ("tokenizer_config.json", '{"model_max_length": "x"}', "tokenizer_config.json"),
    ("merges.txt", "#version: 0.2\n", "merges.txt is cut short: 0 merges do not make 2 tokens"),
    ("merges.txt", "", "merges.txt is cut short"),
    ("merges.txt", "version https://git-lfs.github.com/spec/v1\nsize 1\n", "vocab.json, merges.txt"),
    ("merges.txt", "h e\nh\n", "vocab.json, merges.txt"),
    ("vocab.json", "{}", "vocab.json, merges.txt"),
    ("vocab.json", '{"h": "x", "e": 1}', "vocab.json, merges.txt"),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED, ids=[f"{n} {c[:30]}" for n, c, _ in DAMAGED])
def test_a_damaged_tokenizer_is_named(tmp_path, name, content, message):
    (dream_files(tmp_path) / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_merges_in_another_encoding_are_named(tmp_path):
    (dream_files(tmp_path) / "merges.txt").write_bytes(b"h \xff\n")
    with pytest.raises(ValueError, match=r"merges.txt is not text in UTF-8"):
        load_tokenizer(tmp_path)


def test_only_the_small_files_come_from_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    save_tokenizer(tmp_path, ALPHABET, EOS, MASK)
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda i, **k: asked.update(id=i, **k) or str(tmp_path))
    assert load_tokenizer("org/name", revision="v1", token="secret")("1").input_ids == [1]
    assert (asked["id"], asked["revision"], asked["token"]) == ("org/name", "v1", "secret")
    assert asked["allow_patterns"] == list(folders.TOKENIZER_FILES)
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"])


def test_the_limit_is_that_of_the_tokenizer(tmp_path, small):
    spec = replace(dkv.load(small().folder, device="cpu").spec, vocab_size=300)
    assert with_vocab_limit(spec, tmp_path).vocab_limit is None
    for make in (dream_files, lambda folder: save_tokenizer(folder, ALPHABET, EOS, MASK)):
        make(tmp_path)
        known = 1 + max(load_tokenizer(tmp_path).get_vocab().values())
        # The ends that the model knows must stay possible.
        for eos, limit in ((5, known), (known + 3, known + 4)):
            found = with_vocab_limit(replace(spec, eos_token_id=eos, pad_token_id=None), tmp_path)
            assert found.vocab_limit == limit
        small_spec = replace(spec, vocab_size=known, mask_token_id=1, eos_token_id=2, pad_token_id=None)
        assert with_vocab_limit(small_spec, tmp_path).vocab_limit is None
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": "b"}}}')
    with pytest.raises(ValueError, match=r"tokenizer.json has a token with the id 'b'"):
        with_vocab_limit(spec, tmp_path)


def test_the_limit_counts_every_kind_of_vocabulary(tmp_path, small):
    spec = dkv.load(small(eos_token_id=1, pad_token_id=1).folder, device="cpu").spec

    def limit(**files) -> int | None:
        for old in tmp_path.glob("*.json"):
            old.unlink()
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return with_vocab_limit(spec, tmp_path).vocab_limit

    assert limit(tokenizer={"model": {"vocab": {"a": 0, "b": 9}}}) == 10
    assert limit(tokenizer={"model": {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.0], ["c", -2.0]]}}) == 3
    assert limit(tokenizer={"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 7, "content": "<s>"}]}) == 8
    assert limit(tokenizer={"model": {"vocab": {"a": 0}}}, tokenizer_config={"added_tokens_decoder": {"20": {}}}) == 21
    assert limit(vocab={"a": 0, "model": 3}) == 4
    assert limit(vocab={"a": 0}, added_tokens={"<s>": 11}) == 12
    assert limit(tokenizer={"model": {"vocab": {"a": 0, "b": 63}}}) is None
    # Nothing that tells how many there are.
    assert limit(tokenizer={}) is None
    assert limit(tokenizer_config={"added_tokens_decoder": {"20": {}}}) is None


def test_R12_drawn_ids_have_text(small):
    """At temperature 3 ids of the padded table are drawn as soon as they may be."""
    checkpoint = small(mask_token_id=15, eos_token_id=14, pad_token_id=14)
    bare = dkv.load(checkpoint.folder, device="cpu")
    save_tokenizer(checkpoint.folder, ALPHABET, EOS, MASK)
    model, tokenizer = dkv.load(checkpoint.folder, device="cpu"), dkv.load_tokenizer(checkpoint.folder)
    assert (bare.spec.vocab_limit, model.spec.vocab_limit, model.spec.vocab_size) == (None, 16, 64)
    prompt, call = torch.tensor([[1, 2, 3]]), {"max_new_tokens": 64, "steps": 4, "temperature": 3.0, "seed": 0}

    def drawn(model, **changes):
        output = dkv.generate(model, prompt, **call, **changes)
        return output.sequences[0, 3:].tolist(), output.stats.settings["vocab_limit"]

    ids, limit = drawn(model)
    assert max(ids) < len(tokenizer) == limit == 16
    assert all(tokenizer.convert_ids_to_tokens(i) is not None for i in ids)
    # A setting goes before it, and the size of the table switches it off.
    ids, limit = drawn(model, vocab_limit=5)
    assert max(ids) < 5 == limit
    off, limit = drawn(model, vocab_limit=64)
    assert max(off) >= 16 and limit == 64
    assert off == drawn(bare)[0]
    masks = torch.tensor([[1, MASK, 2, *[MASK] * 40]])
    assert dkv.infill(model, masks, steps=4, temperature=3.0, seed=0).sequences.max() < 16
    assert list(dkv.stream(model, prompt, **call))[-1].sequences[0, 3:].max() < 16
