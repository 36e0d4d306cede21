"""`dkv.map`: every row gets what it gets alone, in the order of the rows; nothing is done twice."""

import json
import random

import pytest
import torch

import dkv
from dkv.common import process
from dkv.serving.dataset import RESULTS
from dkv.serving.job import derived_seed
from tests.dkv.conftest import EOS, small_model


def asked(count, seed=0):
    rng = random.Random(seed)
    for number in range(count):
        row = {"id": f"r{number}", "prompt": [rng.randrange(61) for _ in range(rng.randrange(1, 20))]}
        if rng.random() < 0.5:
            row["max_new_tokens"] = rng.randrange(1, 17)
        if rng.random() < 0.2:
            row["seed"] = rng.randrange(100)
        yield row


def alone(model, row, **settings):
    own = {name: row[name] for name in ("max_new_tokens", "steps", "seed") if name in row}
    prompt = torch.tensor([row["prompt"]])
    return dkv.generate(model, prompt, **{**settings, **own}).sequences[0, prompt.shape[1] :].tolist()


def lines_of(folder):
    return list(map(json.loads, (folder / RESULTS).read_text().splitlines()))


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "cache": "decode"}, {"eos_token_id": EOS}])
def test_rows_get_what_they_get_alone_in_their_order(llada, tmp_path, settings):
    rows, how = list(asked(14)), {"max_new_tokens": 12, **settings}
    found = dkv.map(llada, rows, max_slots=160, out=tmp_path, seed=3, progress=False, **how)
    assert [record["id"] for record in found] == [row["id"] for row in rows]
    for number, (record, row) in enumerate(zip(found, rows, strict=True), 1):
        seed = row.get("seed", derived_seed(3, row["id"]))
        assert (record["line"], record["seed"], record["text"]) == (number, seed, None)
        assert record["tokens"] == alone(llada, {**row, "seed": seed}, **how)
        ended = "eos_token_id" in settings and EOS in record["tokens"]
        assert record["finish_reason"] == ("stop" if ended else "length")
        assert 0 < record["stats"]["passes"] <= len(record["tokens"])
    # As they ended, each once.
    written = lines_of(tmp_path)
    assert sorted(written, key=lambda record: record["line"]) == found and written != found


def test_what_is_done_is_not_done_again(llada, tmp_path, monkeypatch):
    rows, how = list(asked(12)), {"max_new_tokens": 12, "temperature": 1.0, "progress": False}
    whole = dkv.map(llada, rows, max_slots=96, seed=1, **how)
    dkv.map(llada, rows, max_slots=96, seed=1, out=tmp_path, **how)
    lines = (tmp_path / RESULTS).read_text().splitlines(keepends=True)
    (tmp_path / RESULTS).write_text("".join(lines[:7]) + lines[7][:20])
    first, added = dkv.LLM.add, []
    monkeypatch.setattr(dkv.LLM, "add", lambda self, *args, **how: added.append(args) or first(self, *args, **how))
    # The seed of the run is that of its file.
    found = dkv.map(llada, rows, max_slots=64, out=tmp_path, **how)
    assert len(added) == 5 and (tmp_path / RESULTS).read_text().startswith("".join(lines[:7]))
    assert [(r["id"], r["tokens"], r["seed"]) for r in found] == [(r["id"], r["tokens"], r["seed"]) for r in whole]
    assert dkv.map(llada, rows, out=tmp_path, **how) == found and len(added) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 9}, "made with max_new_tokens 8, not 9: give another out, or remove the file"),
        ({"seed": 2}, "made with seed 1, not 2"),
        ({"cache": "decode"}, "made with cache {'name': 'none'}, not {'name': 'decode', "),
        ({"max_length": 100}, "made with max_length None, not 100"),
        ({"chat": True}, "made with chat False, not True"),
        ({"rows": 3}, "made with data '4 lines, .*', not '3 lines, "),
        ({"model": small_model(num_layers=1)}, "made with weights '.*', not '"),
        ({"model": small_model().double()}, "made with dtype 'float32', not 'float64'|made with weights"),
    ],
)
def test_results_of_other_settings_are_not_mixed(llada, tmp_path, change, message):
    def call(rows=4, model=llada, **settings):
        how = {"max_new_tokens": 8, "seed": 1, **settings}
        return dkv.map(model, list(asked(9))[:rows], out=tmp_path, progress=False, **how)

    call()
    # One is left to do: otherwise no weight is looked at.
    lines = (tmp_path / RESULTS).read_text().splitlines(keepends=True)
    (tmp_path / RESULTS).write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=message):
        call(**change)
    assert (tmp_path / RESULTS).read_text() == "".join(lines[:-1])


def test_rows_that_cannot_be_have_a_record_that_says_why(tiny, tmp_path, capsys):
    model, tokenizer = tiny
    rows = [
        *("1+2=", "hello"),
        {"prompt": "1+", "max_new_tokens": 4000},
        {"prompt": [99]},
        {"messages": [{"role": "user", "content": "1"}]},
        *({"prompt": "1", "temperature": 2}, 5),
        {"prompt": "1", "max_new_tokens": 0},
    ]
    found = dkv.map(model, rows, tokenizer=tokenizer, max_new_tokens=8, out=tmp_path)
    errors = [record.get("error", "")[:50] for record in found]
    assert errors == [
        *("", "the model has no token for 'h', 'e', 'l', 'o'; it k"[:50]),
        "2 tokens and the answer need 4002 slots, and the model has 1024"[:50],
        "input_ids must be in 0..18, the model's vocabulary, got 99"[:50],
        "the model's tokenizer has no chat template: give the prompt"[:50],
        *("temperature is a setting of all lines, and one may", "it must be an object, got 5", ""),
    ]
    said = capsys.readouterr().err
    name = process.name()
    assert f"{name}: line 2: the model has no token for" in said and said.count(f"{name}: line ") == 6
    assert found[-1]["tokens"] == []
    # They are not tried again.
    before = (tmp_path / RESULTS).read_text()
    assert dkv.map(model, rows, tokenizer=tokenizer, max_new_tokens=8, out=tmp_path) == found
    assert (tmp_path / RESULTS).read_text() == before


def test_nothing_asked_is_nothing_done(llada, tmp_path):
    assert dkv.map(llada, []) == dkv.map(llada, [], out=tmp_path) == []


def test_few_of_many_bad_rows_are_told(llada, capsys):
    found = dkv.map(llada, [{"prompt": 5}] * 30)
    said = capsys.readouterr().err.splitlines()
    assert (
        len(found) == 30 and len(said) == 20 and said[-1].endswith("others that fail have a record, and are not told")
    )


def test_prompts_and_talks_go_into_the_template(talking):
    model, tokenizer = talking
    rows = [{"prompt": "1+2="}, {"messages": [{"role": "user", "content": "1+"}, {"role": "user", "content": "2="}]}]
    (first, second), (plain, _) = (
        dkv.map(model, rows, tokenizer=tokenizer, chat=chat, max_new_tokens=8, progress=False) for chat in (True, False)
    )
    assert first["tokens"] == second["tokens"] == plain["tokens"] and first["text"] == plain["text"]


def test_a_device_that_fails_ends_the_run_and_fails_no_line(llada, tmp_path, monkeypatch):
    rows, first = list(asked(6)), dkv.LLM.step
    steps = iter(range(1000))

    def step(self):
        if next(steps) == 20:
            for batch in self._batches.values():
                batch.step = lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory"))
        return first(self)

    monkeypatch.setattr(dkv.LLM, "step", step)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        dkv.map(llada, rows, max_slots=64, out=tmp_path, max_new_tokens=16, progress=False)
    monkeypatch.undo()
    kept = lines_of(tmp_path)
    assert 0 < len(kept) < 6 and not any("error" in record for record in kept)
    found = dkv.map(llada, rows, out=tmp_path, max_new_tokens=16, progress=False)
    assert [record["tokens"] for record in found] == [alone(llada, row, max_new_tokens=16) for row in rows]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"devices": "cpu,cpu"}, "devices and dtype are for models that are given by name"),
        ({"temperature": -1}, "temperature must be"),
        ({"max_new_token": 4}, "max_new_token"),
        ({"schedule": "speculative"}, "does not go with"),
        ({"max_slots": 2}, r"max_slots \(2\) must be at least max_length"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(llada, tmp_path, call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        dkv.map(llada, [{"prompt": [1, 2]}], out=tmp_path / "out", **call)
    assert list(tmp_path.rglob("*.json")) == []


def test_devices_are_names_or_a_number(monkeypatch):
    from dkv.serving.devices import devices_of

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [devices_of(given) for given in (None, "cpu, cpu", ["cuda:1"], 2, "1")] == [
        *(None, ["cpu", "cpu"], ["cuda:1"], ["cpu", "cpu"], ["cpu"]),
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices_of("2") == ["cuda:0", "cuda:1"]
    for given in (4, 0, "", "cpu,,cpu", []):
        with pytest.raises(ValueError, match="devices must be"):
            devices_of(given)
