"""Headers of safetensors files that do not describe their bytes."""

import json
import os
import struct

import pytest

from dkv.models import load
from dkv.models.files import BITS, MOST_HEADER, read_header


def file_of(folder, table, room: int = 16):
    """A file with this header (JSON text or an object) and so many bytes of numbers."""
    text = (table if isinstance(table, str) else json.dumps(table)).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(room))
    return path


def one(**changes) -> dict:
    return {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


def two(first: list[int], second: list[int]) -> dict:
    return {n: {"dtype": "F32", "shape": [2], "data_offsets": at} for n, at in (("a", first), ("b", second))}


def test_what_a_header_says(tmp_path):
    entry = read_header(file_of(tmp_path, {"__metadata__": {"format": "pt"}, **one()}))["a"]
    assert (entry.dtype, entry.shape, entry.bytes) == ("F32", (2, 2), 16)
    assert read_header(file_of(tmp_path, one(shape=[0, 4], data_offsets=[0, 0]), 0))["a"].bytes == 0
    # A code that is not known is no damage; it is refused where its tensor is wanted.
    assert read_header(file_of(tmp_path, one(dtype="F128")))["a"].dtype == "F128"


BROKEN = {
    "overlap": (two([0, 8], [4, 12]), "b overlaps another tensor"),
    "same bytes": (two([0, 8], [0, 8]), "overlaps another tensor"),
    "hole": (
        {**one(shape=[1], data_offsets=[0, 4]), "b": one(shape=[2], data_offsets=[8, 16])["a"]},
        "b leaves 4 bytes",
    ),
    "late start": (one(shape=[3], data_offsets=[4, 16]), "a leaves 4 bytes unused"),
    "surplus": (one(shape=[3], data_offsets=[0, 12]), "4 bytes follow its last tensor"),
    "beyond the end": (one(shape=[5], data_offsets=[0, 20]), "truncated: its header promises"),
    "backwards": (one(data_offsets=[16, 0]), "needs 16 bytes, and its header gives a -16"),
    "negative offset": (one(data_offsets=[-16, 0]), r"says of a: .*data_offsets \[-16, 0\]"),
    "float offset": (one(data_offsets=[0, 16.0]), r"data_offsets \[0, 16.0\]"),
    "bool offset": (one(data_offsets=[False, 16]), r"data_offsets \[False, 16\]"),
    "one offset": (one(data_offsets=[16]), r"data_offsets \[16\]"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, "data_offsets None"),
    "negative sizes": (one(shape=[-2, -2]), r"shape \[-2, -2\]"),
    "float sizes": (one(shape=[2.0, 2]), r"shape \[2.0, 2\]"),
    "huge sizes": (one(shape=[10**30, 2]), "needs 8000000000000000000000000000000 bytes"),
    "sizes that wrap around": (one(shape=[2**62, 4]), "needs .* bytes, and its header gives a 16"),
    "shape of another size": (one(shape=[2, 3]), "needs 24 bytes, and its header gives a 16"),
    "dtype of another size": (one(dtype="F16"), "needs 8 bytes, and its header gives a 16"),
    "dtype": (one(dtype=32), "dtype 32"),
    "shape": (one(shape="22"), "shape '22'"),
    "entry": ({"a": [1, 2]}, "says of a: dtype None"),
    "twice": ('{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}', "its header cannot be read"),
    "list": ("[1, 2, 3, 4]", "its header cannot be read"),
    "nested": ("[" * 200_000, "its header cannot be read"),
    "utf-16": (json.dumps(one()).encode("utf-16").decode("latin-1"), "its header cannot be read"),
}


@pytest.mark.parametrize(("table", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_headers_are_named(tmp_path, table, message):
    path = file_of(tmp_path, table)
    with pytest.raises(ValueError, match=rf"model.safetensors is .*{message}.*fetch the file again"):
        read_header(path)


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 3 << 30))
    os.truncate(path, 4 << 30)  # takes no room on the disk
    with pytest.raises(ValueError, match=r"not a safetensors file .a header of 3221225472 bytes.: fetch"):
        read_header(path)
    assert MOST_HEADER == 100_000_000


def test_sizes_of_the_known_codes():
    """As the library itself writes them."""
    import torch
    from safetensors.torch import save

    for dtype in (torch.bool, torch.int8, torch.int16, torch.int64, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        content = save({"a": torch.zeros(8).to(dtype)})
        header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])["a"]
        assert BITS[header["dtype"]] * 8 == 8 * (header["data_offsets"][1] - header["data_offsets"][0])


def test_shards_are_checked_alike(small):
    index = small().shard()
    shard = index.parent / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes() + b"surplus")
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is damaged: 7 bytes follow"):
        load(index.parent)
