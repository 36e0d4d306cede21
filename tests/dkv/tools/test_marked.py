"""Markers in a text, and the text around them."""

import pytest

import dkv
from dkv.models.export import MASK_TOKENS
from dkv.tools.gaps import Gap
from dkv.tools.marked import marked
from dkv.tools.text import filling_text, mask_text


@pytest.mark.parametrize(
    ("text", "options", "pieces", "gaps"),
    [
        ("a[MASK]b", {}, ["a", "b"], [Gap(1, 1)]),
        ("[MASK][MASK]b[MASK:5]", {}, ["", "b", ""], [Gap(2, 2), Gap(5, 5)]),
        ("a[MASK]b", {"most": 8}, ["a", "b"], [Gap(0, 8)]),
        ("a[MASK:3]b[MASK]c", {"most": 8}, ["a", "b", "c"], [Gap(3, 3), Gap(0, 8)]),
        ("a[MASK][MASK:2]b", {"most": 8}, ["a", "b"], [Gap(2, 10)]),
        ("a__b", {"marker": "_"}, ["a", "b"], [Gap(2, 2)]),
        ("a_:5b", {"marker": "_"}, ["a", ":5b"], [Gap(1, 1)]),
        ("a<gap:4>b[MASK]", {"marker": "<gap>"}, ["a", "b[MASK]"], [Gap(4, 4)]),
        ("a.*b", {"marker": ".*"}, ["a", "b"], [Gap(1, 1)]),
        ("a<|m|>b[MASK]", {"own": "<|m|>"}, ["a", "b", ""], [Gap(1, 1)] * 2),
        ("a[mask]b [MASK", {}, ["a[mask]b [MASK"], []),
        ("", {}, [""], []),
    ],
)
def test_a_text_is_cut_at_its_markers(text, options, pieces, gaps):
    found = marked(text, **options)
    assert (found.pieces, found.gaps) == (pieces, gaps)
    assert found.joined(["x" * gap.most for gap in gaps]) == "".join(
        part for pair in zip(pieces, ["x" * gap.most for gap in gaps] + [""], strict=True) for part in pair
    )


@pytest.mark.parametrize("text", ["[MASK:0]", "[MASK:]", "[MASK:-1]", "[MASK:two]", "[MASK:1.5]", "[MASK: 3]"])
def test_a_number_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"is no gap: write \[MASK\] for one token or \[MASK:5\] for five"):
        marked(f"a{text}b")
    with pytest.raises(ValueError, match="--marker must not be empty"):
        marked("a", marker="")


@pytest.mark.parametrize("name", ["tiny", "tiny-dream"])
def test_pieces_are_tokenised_by_themselves(name):
    from dkv.models.bundled.recipes import RECIPES

    spec = RECIPES[name].spec
    tokenizer = dkv.load_tokenizer(name)
    own = mask_text(tokenizer, spec)
    assert own == MASK_TOKENS[spec.family]
    text = marked(f"12[MASK]3{own}", own=own)
    assert text.tokens(tokenizer) == [1, 2, Gap(1, 1), 3, Gap(1, 1)]
    tokenizer.bos_token = "<|endoftext|>"
    assert text.tokens(tokenizer)[0] == 1, "a start token that the tokenizer does not write itself is not added"
    with pytest.raises(ValueError, match="the model has no token for 'x'"):
        marked("1x[MASK]").tokens(tokenizer)
    assert filling_text(tokenizer, [1, spec.eos_token_id, 13, 2]) == "1 2"
    assert filling_text(tokenizer, [1, spec.eos_token_id], raw=True) == "1<|endoftext|>"


def test_a_number_of_thousands_of_digits_is_no_gap():
    for digits in ("9" * 5000, "0" * 5000 + "1"):
        with pytest.raises(ValueError, match="is no gap: write"):
            marked(f"1[MASK:{digits}]2")


def test_a_text_of_many_begun_markers_is_cut_in_one_go():
    # In the square of its length this would take hours.
    assert not marked("[MASK:" * 100_000, "[MASK]").gaps
