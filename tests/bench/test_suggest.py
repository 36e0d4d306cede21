"""`dkv suggest`: who is left out, who is named, and how it is written."""

import pytest
import torch

import dkv
from dkv.bench.accuracy import quality, suggest
from dkv.bench.contenders import contenders
from dkv.bench.problems import Openings, Problems


def row(label, speed, change, half=0.5, problems=400, **more):
    interval = {"change": change, "change_low": change - half, "change_high": change + half}
    return {"label": label, "speed": speed, "problems": problems, "right": problems, "texts": 0, **interval, **more}


PLAIN = row("plain", 1.0, 0.0, 0.0)


def test_the_fastest_that_loses_little_is_named():
    rows = [PLAIN, row("a", 2.0, 0.0), row("b", 3.0, -0.9), row("c", 9.0, -1.1), row("d", 20.0, 0.0, problems=16)]
    assert suggest.best(rows, 1.0)["label"] == "b" and suggest.best(rows, 0.5)["label"] == "a"
    assert suggest.best([PLAIN, row("slow", 0.9, 0.0)], 1.0) is None
    said = suggest.verdict(rows, 1.0).splitlines()
    assert said[0] == "b: 3.00x plain, -0.9 points on 400 problems (95 %: -1.4 to -0.4)."
    assert said[1].startswith("So few problems cannot rule out a loss of more than 1 points")
    assert len(suggest.verdict(rows, 0.5).splitlines()) == 1
    assert suggest.verdict([PLAIN], 1.0).startswith("Nothing is faster than plain decoding")


def test_nothing_is_named_on_problems_that_are_too_hard():
    rows = [PLAIN | {"right": 2, "problems": 96}, row("a", 2.0, 0.0, problems=96)]
    assert suggest.best(rows, 1.0) is None
    hard = (
        "Plain decoding answers 2 of the 96 problems: accuracy cannot tell settings apart here. Give easier problems."
    )
    assert suggest.verdict(rows, 1.0) == hard
    # Texts may tell all the same.
    rows = [r | {"texts": 9, "nats_change": 0.0, "nats_low": 0.0, "nats_high": 0.0} for r in rows]
    assert suggest.best(rows, 1.0)["label"] == "a"
    first, second, *_ = suggest.verdict(rows, 1.0).splitlines()
    assert first == hard and second.startswith("a: 2.00x plain")


def test_who_is_sure_to_lose_more_is_left_out():
    assert suggest.lost(row("a", 2.0, -3.0, 0.5), 1.0) and not suggest.lost(row("a", 2.0, -3.0, 2.5), 1.0)
    assert suggest.lost({"nats_low": 0.06}, 1.0) and not suggest.lost({"nats_low": 0.04}, 1.0)


def test_texts_must_be_as_likely_as_those_of_plain_decoding():
    texts = {"problems": 0, "right": 0, "texts": 9}
    plain = {"label": "plain", "speed": 1.0, "nats_change": 0.0, **texts}
    likely = {"label": "a", "speed": 2.0, "nats_change": 0.04, "nats_low": 0.03, "nats_high": 0.05, **texts}
    rows = [plain, likely, likely | {"label": "b", "speed": 3.0, "nats_change": 0.06}]
    assert suggest.best(rows, 1.0)["label"] == "a"
    assert suggest.verdict(rows, 1.0) == "a: 2.00x plain, +0.040 nats a token (95 %: +0.030 to +0.050)."


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("cache=decode refresh=4 threshold=0.9", "cache=dkv.DecodeCache(refresh=4), threshold=0.9"),
        ("cache=dual block_length=32", "cache=dkv.DualCache(), block_length=32"),
        (
            "cache=greedy window_center=last steps=half",
            "cache=dkv.GreedyCache(window_center='last'), steps=round(0.5 * N)",
        ),
    ],
)
def test_the_call_can_be_copied(run, words):
    contender = contenders([run])[1]
    call = suggest.in_python(contender)
    assert call == f"dkv.generate(model, **encoding, max_new_tokens=N, {words})"
    model, tokenizer = dkv.load("tiny", device="cpu"), dkv.load_tokenizer("tiny")
    encoding = tokenizer("+1 +2 =", return_tensors="pt")
    found = eval(call, {"dkv": dkv, "model": model, "encoding": encoding, "N": 8})
    wanted = dkv.generate(model, **encoding, **contender.settings_for(8))
    assert torch.equal(found.sequences, wanted.sequences)


def test_the_lost_get_no_more_batches():
    model, tokenizer = dkv.load("tiny", device="cpu"), dkv.load_tokenizer("tiny")
    families = [Problems("sum", ["1+1=", "2+2=", "3+3="], ["a", "b", "c"], 4), Openings("text", ["1+1="] * 3, 4)]
    log, asked = quality.Log(None, {}), []

    def lost(row):
        asked.append((row["label"], row["problems"], row["texts"]))
        return row["label"] == "decode 2"

    ways = contenders(["cache=decode refresh=2,4"])
    rows = quality.measure(quality.Setting(model, tokenizer, families, 2, 0), ways, log, lost)
    assert asked[:2] == [("decode 2", 2, 0), ("decode 4", 2, 0)]
    assert [(r["label"], r["problems"], r["texts"]) for r in rows] == [
        ("plain", 3, 3),
        ("decode 2", 2, 0),
        ("decode 4", 3, 3),
    ]
