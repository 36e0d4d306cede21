"""A folder with bytes of its files changed at random: it loads, or a file of it is named, and nothing waits."""

import random
import re
import time

import pytest

from dkv.models import load, load_tokenizer
from dkv.models.folders import BUNDLED

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
JUNK = (b"", b"\x00", b"\xff", b"9" * 30, *b'null -1 1e999 NaN true "false" [] {} [[[[ " } , 0.5 {"a":1}'.split())
# A value of an object, with what stands before it.
VALUE = re.compile(rb'(?<=":)( ?)("[^"]*"|-?[\d.e+-]+|true|false|null|\[[^\]]*\])')


def changed(content: bytes, head: int, rng: random.Random) -> bytes:
    """The content with some of its first `head` bytes replaced, cut off, deleted, or a value exchanged."""
    at, junk, long = rng.randrange(head), rng.choice(JUNK), rng.randrange(30)
    value = rng.choice(list(VALUE.finditer(content[:head])))
    kinds = (
        lambda: content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
        lambda: content[:at],
        lambda: content[:at] + content[at + long :],
        lambda: content[:at] + junk + content[at + long :],
        lambda: content[: value.start()] + junk + content[value.end() :],
    )
    return rng.choice(kinds)()


@pytest.mark.parametrize("count", [12, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("model", BUNDLED)
def test_changed_bytes_load_or_are_named(model, name, count, tmp_path):
    rng = random.Random(f"{model} {name}")
    for file in FILES:
        (tmp_path / file).write_bytes((BUNDLED[model] / file).read_bytes())
    path = tmp_path / name
    content = path.read_bytes()
    head = 8 + int.from_bytes(content[:8], "little") if name.endswith("safetensors") else len(content)
    refused = 0
    for _ in range(count):
        damaged = changed(content, head, rng)
        if name.endswith("safetensors") and rng.random() < 0.5:
            # As long as it says, so that more than its length is wrong.
            damaged = (head - 8 + len(damaged) - len(content)).to_bytes(8, "little", signed=True) + damaged[8:]
        path.write_bytes(damaged)
        for reader in (lambda: load(tmp_path, device="cpu", pack=False), lambda: load_tokenizer(tmp_path)):
            start = time.process_time()
            try:
                reader()
            except (ValueError, OSError) as error:
                refused += 1
                assert re.search("json|safetensors|configuration|model family", str(error)), error
            assert time.process_time() - start < 20
    assert refused > count / 6
