"""Runs written as text: what they become, and what is refused."""

import pytest

import dkv
from dkv.bench.contenders import contenders, of_lineup
from dkv.bench.lineup import BLOCKED, COMPARED, FULL, LINEUP, ON_GPU, QUICK, SHIFTED, SHOWN


def test_lists_are_multiplied_out_and_plain_comes_first():
    found = contenders(["cache=decode refresh=2,8 steps=all,half"])
    assert [c.label for c in found] == ["plain", "decode 2", "decode 2 half", "decode 8", "decode 8 half"]
    assert found[2].settings_for(64) == {"max_new_tokens": 64, "steps": 32, "cache": dkv.DecodeCache(2)}
    assert found[1].settings_for(64)["steps"] is None


def test_a_run_named_twice_is_one():
    found = contenders(["steps=all,half", "cache=none", "confidence=probability steps=0.5", "alg=maskgit_plus"])
    assert [c.label for c in found] == ["plain", "plain half"]


def test_a_run_in_other_words_is_the_same_run():
    """One contender by label and one by what it does: an order, a default or a number written otherwise."""
    found = contenders(["cache=greedy refresh=4 window=8", "cache=greedy window=8 refresh=4"])
    assert [c.label for c in found] == ["plain", "greedy 4 w8"]
    default = dkv.DecodeCache().refresh
    assert len(contenders(["cache=decode", f"cache=decode refresh={default}"])) == 2
    assert len(contenders(["temperature=1", "temperature=1.0", "cache=none temperature=1"])) == 2


@pytest.mark.parametrize(
    ("text", "label", "settings"),
    [
        (
            "cache=greedy refresh=4 window=0 window_center=last",
            "greedy 4 w0 last",
            {"cache": dkv.GreedyCache(4, 0, window_center="last")},
        ),
        ("remasking=random temperature=0.5", "plain random t0.5", {"confidence": "random", "temperature": 0.5}),
        (
            "cache=decode shift_rule=un_right warmup=1 block_length=8",
            "decode un_right warmup=1 b8",
            {"cache": dkv.DecodeCache(warmup=1, shift_rule="un_right"), "block_length": 8},
        ),
        ("steps=7 top_p=0.9", "plain top_p=0.9 steps 7", {"steps": 7, "top_p": 0.9}),
    ],
    ids=lambda x: x if isinstance(x, str) and "=" in x else "",
)
def test_settings_of_the_policy_and_of_the_generation(text, label, settings):
    found = contenders([text])[1]
    assert found.label == label
    assert settings.items() <= found.settings_for(64).items()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cache=foo", "unknown policy 'foo'"),
        ("cache=decode window=3", "policy 'decode' has no window; it takes"),
        ("cache=decode refesh=3", r"unknown setting 'refesh'; did you mean 'refresh'\?$"),
        ("cahce=decode", "did you mean 'cache'"),
        ("stepz=half", "did you mean 'steps'"),
        ("zzz=1", "unknown setting 'zzz'; known are cache, steps, weights, block_length"),
        ("cache=decod", "unknown policy 'decod'; did you mean 'decode'"),
        ("cache=decode refresh=2 refresh=4", "refresh is named twice: give its values as refresh=value,value"),
        ("temprature=1", "did you mean 'temperature'"),
        ("confidence=best", "confidence must be one of"),
        ("steps=1.5", "steps must be a whole number, a share"),
        ("steps=some", "steps must be a whole number, a share"),
        ("steps=0", "steps must be a whole number of at least 1"),
        ("seed=3", "seed cannot differ between runs"),
        ("gen_length=3", "max_new_tokens cannot differ"),
        ("decode", "'decode' is not of the form name=value"),
        ("refresh=2,", "not of the form"),
        ("cache=decode refresh=-1", "refresh"),
    ],
)
def test_bad_runs_are_refused_with_their_text(text, message):
    with pytest.raises(ValueError, match=f"^--run '{text}': .*{message}"):
        contenders([text])


def test_the_grids_have_every_axis_of_the_paper():
    labels = [c.label for c in contenders(FULL)]
    assert len(set(labels)) == len(labels)
    for label in (
        "plain half",
        "plain random",
        "prefill half",
        "decode 16 half",
        "pd 2",
        "greedy 2 w0 last",
        "greedy 16 w8 random",
        "greedy 4 w2 next",
    ):
        assert label in labels
    assert {"decode 8 un_right", "pd 16 un_right"} <= {c.label for c in contenders(SHIFTED)}
    assert {c.label for c in contenders(QUICK)} <= set(labels)


def test_every_name_of_the_line_up_is_a_way_to_generate():
    found = {name: of_lineup(name) for name in LINEUP}
    assert all(contender.label == name for name, contender in found.items())
    assert found["greedy 16"].settings == {"cache": dkv.GreedyCache(16, 4), "confidence": "random"}
    assert found["decode, no refresh"].settings == {"cache": dkv.DecodeCache(0, warmup=1)}
    assert found["dual delayed"].settings == {"cache": dkv.DualCache(delayed=True)}
    assert found["plain half"].steps == 0.5 and found["plain"].settings == {"cache": dkv.NoCache()}
    assert {*COMPARED, *SHOWN, *BLOCKED, *ON_GPU} <= set(LINEUP)
    assert {names[0] for names in (COMPARED, SHOWN, BLOCKED, ON_GPU)} == {"plain"}
