"""Lines of a data set: what each asks, and what is wrong with the others."""

import json

import pytest

from dkv.serving import lines
from dkv.serving.job import derived_seed


def read(tmp_path, *rows):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return lines.from_file(path)


def test_ids_prompts_talks_and_settings_of_their_own(tmp_path):
    talk = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    found = read(
        tmp_path,
        b"\xef\xbb\xbf" + json.dumps({"id": "a", "prompt": "1+2=", "answer": "3"}).encode() + b"\r\n",
        b"\n",
        {"id": 7, "messages": [{**message, "name": "x"} for message in talk], "max_new_tokens": 5, "steps": None},
        {"id": "7", "prompt": [1, 2, 3], "seed": -4, "steps": 2},
        b'{"id": "last", "prompt": ""}',
    )
    assert found.lines == [
        lines.Line(1, "a", "1+2="),
        lines.Line(3, 7, talk, {"max_new_tokens": 5}),
        lines.Line(4, "7", [1, 2, 3], {"steps": 2, "seed": -4}),
        lines.Line(5, "last", ""),
    ]


def test_without_ids_the_numbers_of_the_lines_stand_in(tmp_path):
    found = read(tmp_path, {"prompt": "1"}, b"\n", b"no\n", {"prompt": "2"})
    assert [(line.number, line.id, line.error is None) for line in found.lines] == [
        (1, 1, True),
        (3, 3, False),
        (4, 4, True),
    ]
    assert lines.from_rows(["1", {"prompt": "2"}]).lines == [lines.Line(1, 1, "1"), lines.Line(2, 2, "2")]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (b'{"id": 1, "prompt": "x"\n', "it is not JSON (Expecting ',' delimiter"),
        (b'{"id": 1, "prompt": "\xff"}\n', "it is not UTF-8 (byte 21)"),
        (b"[" * 100_000 + b"\n", "it is not JSON ("),
        ([1], "it must be an object, got [1]"),
        ({"prompt": "x"}, "it has no id, and others have: give all lines one, or none"),
        ({"id": None, "prompt": "x"}, "id must be a text or a whole number, got null"),
        ({"id": True, "prompt": "x"}, "id must be a text or a whole number, got true"),
        ({"id": 1.0, "prompt": "x"}, "id must be a text or a whole number, got 1.0"),
        ({"id": "", "prompt": "x"}, 'id must be a text or a whole number, got ""'),
        ({"id": "good", "prompt": "x"}, "the id 'good' is that of line 1, too"),
        ({"id": 1}, "it must have prompt or messages, and has neither"),
        ({"id": 1, "prompt": "x", "messages": []}, "it must have prompt or messages, and has both"),
        ({"id": 1, "prompt": 5}, "prompt must be a text, or a list of token ids, got 5"),
        ({"id": 1, "prompt": []}, "prompt must be a text, or a list of token ids, got []"),
        ({"id": 1, "prompt": [True]}, "prompt must be a text, or a list of token ids, got [true]"),
        ({"id": 1, "prompt": "\ud800"}, "prompt is no text: it has half of a surrogate pair"),
        ({"id": 1, "messages": []}, "messages must be a list of objects with role and content"),
        ({"id": 1, "messages": ["x"]}, "messages[0] must be an object with role and content"),
        ({"id": 1, "messages": [{"role": "user"}]}, "messages[0].content must be a text, got null"),
        ({"id": 1, "prompt": "x", "max_new_tokens": -1}, "max_new_tokens must be a whole number of at least 0, got -1"),
        ({"id": 1, "prompt": "x", "max_new_tokens": [1]}, "max_new_tokens must be one whole number, got [1]"),
        ({"id": 1, "prompt": "x", "seed": "a"}, "seed must be a whole number"),
        (
            {"id": 1, "prompt": "x", "temperature": 1},
            "temperature is a setting of all lines, and one may have max_new_tokens, steps, seed: remove or rename",
        ),
        ({"id": 1, "prompt": "x", "gen_length": 4}, "gen_length is a setting of all lines"),
    ],
)
def test_a_bad_line_is_told_and_the_others_are_not(tmp_path, row, error):
    first, bad, last = read(tmp_path, {"id": "good", "prompt": "1"}, row, {"id": "last", "prompt": "2"}).lines
    assert (first.error, last.error, bad.number) == (None, None, 2) and bad.error.startswith(error)


def test_what_is_read_has_a_fingerprint(tmp_path):
    one = {"id": 1, "prompt": "1"}
    first = read(tmp_path, one, {"id": 2, "prompt": "2"}).digest
    assert first == read(tmp_path, one, b'{"id": 2, "prompt": "2"}').digest
    assert first != read(tmp_path, one, {"id": 2, "prompt": "3"}).digest
    assert lines.from_rows([one]).digest != lines.from_rows([one, one]).digest
    with pytest.raises(ValueError, match="is empty: give a JSON object a line"):
        read(tmp_path, b"\n\n")


def test_seeds_follow_from_the_run_and_the_id():
    seeds = {derived_seed(seed, line) for seed in (0, 1) for line in (1, "1", "a")}
    assert len(seeds) == 6 and all(0 <= seed < 2**62 for seed in seeds)
    # Those of results that exist must not change.
    assert derived_seed(0, "a") == 3025320046292549078
