"""The text of an answer as it grows: never taken back, the same however it comes."""

import random

import pytest

from dkv.serving.written import Written

END = 0


class Bytes:
    """A token is a byte."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", "replace")


def fed(data: bytes, cuts, stops=(), ends=(END,)):
    """Pieces and the `Written` of bytes that come in steps."""
    written, pieces = Written(Bytes(), ends, stops), []
    for cut in [*cuts, len(data)]:
        if written.finish is None:
            pieces.append(written.take(list(data[:cut]), last=cut == len(data)))
    return pieces, written


def test_a_character_is_given_out_whole():
    pieces, written = fed("a€b".encode(), [1, 2, 3, 4])
    assert pieces == ["a", "", "", "€", "b"] and written.finish == "length" and written.tokens == 5


def test_bytes_that_are_no_character_stand_at_the_end_alone():
    assert fed(b"a\xe2\x82", [2])[0] == ["a", "\ufffd"]


def test_an_end_is_not_text_and_nothing_follows_it():
    pieces, written = fed(b"ab\0cd", [1, 4])
    assert pieces == ["a", "b"] and (written.text, written.finish, written.tokens) == ("ab", "stop", 2)


def test_what_may_be_a_stop_string_is_held_back():
    assert fed(b"xabyabc!", [2, 3, 4, 6], ["abc"])[0] == ["x", "", "aby", "", ""]
    assert fed(b"xab", [2], ["abc"])[0] == ["x", "ab"]


def test_of_two_stop_strings_the_one_counts_that_is_complete_first():
    assert fed(b"xabc", [], ["abc", "b"])[1].text == "xa"
    assert fed(b"xabc", [], ["abc", "bc"])[1].text == "x"


@pytest.mark.parametrize("seed", range(50))
def test_the_text_is_the_same_in_whatever_steps_it_comes(seed):
    draw = random.Random(seed)
    data = bytes(draw.choices(b"ab\xc3\xa4\0", (4, 4, 1, 1, 0.3), k=30))
    stops = ["".join(draw.choices("ab", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
    _, whole = fed(data, [], stops)
    pieces, written = fed(data, sorted(draw.sample(range(30), 12)), stops)
    assert "".join(pieces) == written.text == whole.text
    assert (written.finish, written.tokens) == (whole.finish, whole.tokens)
