"""Files that are something else than they should be."""

import json
import os

import pytest

from dkv.models import load, load_tokenizer
from dkv.models.export import save_tokenizer
from dkv.models.files import read_json

CONTENTS = {
    "empty": (b"", "is not valid JSON"),
    "no json": (b"{", "is not valid JSON"),
    "another encoding": ('{"a": "h\u00e9"}'.encode("latin-1"), "is not valid JSON .*utf-8"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "is not valid JSON"),
    "nested lists": (b"[" * 200_000, "is not valid JSON .it is nested too deeply."),
    "nested objects": (b'{"a":' * 200_000, "is not valid JSON .it is nested too deeply."),
    "a list": (b"[1]", "holds a JSON list, not an object"),
    "null": (b"null", "holds a JSON NoneType, not an object"),
    "a long number": (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    "twice": (b'{"a": 1, "b": 2, "a": 3}', "is not valid JSON .'a' stands there twice."),
}


@pytest.fixture
def folder(small):
    """A model with a tokenizer and every optional file."""
    checkpoint = small(mask_token_id=15, eos_token_id=14, pad_token_id=14)
    save_tokenizer(checkpoint.folder, "0123456789+-= ", 14, 15)
    for name in ("generation_config.json", "added_tokens.json", "special_tokens_map.json"):
        (checkpoint.folder / name).write_text("{}")
    return checkpoint.folder


READ_BY = {
    "config.json": (load, load_tokenizer),
    "generation_config.json": (load,),
    "tokenizer.json": (load, load_tokenizer),
    "tokenizer_config.json": (load, load_tokenizer),
    "added_tokens.json": (load, load_tokenizer),
    "special_tokens_map.json": (load_tokenizer,),
}


@pytest.mark.parametrize(("content", "message"), CONTENTS.values(), ids=CONTENTS)
def test_every_json_file_is_named(folder, content, message):
    for name, readers in READ_BY.items():
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        for reader in readers:
            with pytest.raises(ValueError, match=rf"{name} {message}"):
                reader(folder)
        (folder / name).write_bytes(before)


@pytest.mark.parametrize("name", [*READ_BY, "model.safetensors", "merges.txt", "chat_template.jinja"])
def test_what_is_no_file_is_named_and_not_waited_for(folder, name):
    readers = READ_BY.get(name, (load,) if name == "model.safetensors" else (load_tokenizer,))
    path = folder / name
    path.unlink(missing_ok=True)
    path.mkdir()
    for reader in readers:
        with pytest.raises(ValueError, match=rf"{name} is a folder: put the file in its place"):
            reader(folder)
    path.rmdir()
    os.mkfifo(path)
    for reader in readers:
        with pytest.raises(ValueError, match=rf"{name} is no regular file"):
            reader(folder)
    path.unlink()
    path.symlink_to(folder / "nowhere")
    for reader in readers:
        with pytest.raises(ValueError, match=rf"{name} is a link to a file that does not exist"):
            reader(folder)


def test_a_mark_in_front_means_nothing(folder):
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(folder, device="cpu").spec.eos_token_id == 14


def test_links_inside_are_followed(folder, tmp_path):
    """As in the caches of the hub."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in folder.iterdir():
        (cache / path.name).symlink_to(path)
    assert load(cache, device="cpu").spec == load(folder, device="cpu").spec
    assert load_tokenizer(cache)("1+1").input_ids == [1, 10, 1]


def test_a_file_that_is_too_long_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match=r"config.json has 1099511627776 bytes, too many for a JSON file"):
        read_json(path)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/hostname", "a/../../b", "C:\\w.safetensors", "..\\w"])
def test_shards_outside_the_folder_are_refused(small, shard):
    index = small().shard()
    places = json.loads(index.read_text())["weight_map"]
    (index.parent.parent / "other.safetensors").write_bytes((index.parent / next(iter(places.values()))).read_bytes())
    index.write_text(json.dumps({"weight_map": {**places, next(iter(places)): shard}}))
    with pytest.raises(ValueError, match=r"index.json names files outside its folder \(.*\): fetch"):
        load(index.parent)


def test_shards_in_a_folder_inside_are_read(small):
    index = small().shard()
    places = json.loads(index.read_text())["weight_map"]
    (index.parent / "parts").mkdir()
    for name in set(places.values()):
        (index.parent / name).rename(index.parent / "parts" / name)
    index.write_text(json.dumps({"weight_map": {n: f"parts/{s}" for n, s in places.items()}}))
    assert load(index.parent, device="cpu").spec.num_layers == 2
