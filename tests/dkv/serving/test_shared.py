"""An `LLM` whose model several processes share, played by threads; and the commands that have one."""

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

import dkv
from dkv.engine.continuous import ContinuousBatch
from dkv.parallel import Lost
from dkv.serving import shared
from dkv.serving.request import CANCELLED, FAILED, FINISHED
from dkv.tools.text import answer, end_ids
from tests.dkv.sharing import PLAIN, ROOT, WITHOUT, started
from tests.together import Team, together

FOLDER = ROOT / PLAIN["llada"]
SETTINGS = {"cache": "dual", "block_length": 4, "temperature": 0.6}


def prompts(count: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(0, 60, (1, 2 + i % 4), generator=draw) for i in range(count)]


def led(work, others: int = 1, **how):
    """What `work` gives with the `LLM` of the first process, while the others follow."""

    def call(ranks):
        model = dkv.load(FOLDER, dtype="float64", ranks=ranks)
        if ranks.rank:
            return shared.follow(model)
        llm = shared.llm_of(model, max_length=24, max_slots=48, **{**SETTINGS, **how})
        found = work(llm)
        llm.close()
        return found

    return together(1 + others, call)[0]


@pytest.fixture(scope="module")
def alone():
    model = dkv.load(FOLDER, dtype="float64", device="cpu")

    def found(ids, **settings):
        output = dkv.generate(model, ids, **{**SETTINGS, **settings})
        return output.sequences[0, ids.shape[1] :].tolist()

    return found


def test_every_request_gets_what_it_gets_alone(alone):
    own = [{"max_new_tokens": 4 + i % 5, "seed": i, **({"threshold": 0.2} if i % 3 == 0 else {})} for i in range(7)]
    asked = led(lambda llm: llm.generate(prompts(7), own=own, progress=False), others=3)
    assert [x.tokens.tolist() for x in asked] == [alone(p, **o) for p, o in zip(prompts(7), own, strict=True)]


def test_requests_that_go_at_any_time(alone):
    def work(llm):
        going = [llm.add(ids, max_new_tokens=8, seed=i) for i, ids in enumerate(prompts(6))]
        llm.cancel(going[1])  # before the others heard of it
        llm.step()
        llm.cancel(going[0])  # with a row
        llm.cancel(going[5])  # that waits
        while llm.running or llm.waiting:
            llm.step()
        llm.cancel(going[2])  # done
        return going

    going = led(work)
    assert [x.state for x in going] == [CANCELLED, CANCELLED, FINISHED, FINISHED, FINISHED, CANCELLED]
    for i in (2, 3, 4):
        assert going[i].tokens.tolist() == alone(prompts(6)[i], max_new_tokens=8, seed=i)


def test_a_request_that_cannot_be_harms_no_other(alone):
    def work(llm):
        with pytest.raises(ValueError, match="row has 24"):
            llm.add([1, 2, 3], max_new_tokens=30)
        with pytest.raises(ValueError, match="logits_processor does not go with a model that several"):
            llm.add([1, 2, 3], logits_processor=lambda ids, x: x)
        odd = llm.add([1, 2, 3], max_new_tokens=4, steps=200)
        good = llm.add(prompts(1)[0], max_new_tokens=5, seed=1)
        while not (odd.done and good.done):
            llm.step()
        return odd, good

    odd, good = led(work)
    assert odd.state in (FAILED, FINISHED) and good.tokens.tolist() == alone(prompts(1)[0], max_new_tokens=5, seed=1)


def test_texts_whose_masks_are_filled():
    whole = dkv.load(FOLDER, dtype="float64", device="cpu")
    texts = [torch.tensor([[5, 9, whole.spec.mask_token_id, 7, *[whole.spec.mask_token_id] * n]]) for n in (2, 5)]

    def work(llm):
        asked = [llm.add(ids, infill=True, seed=2) for ids in texts]
        while llm.running or llm.waiting:
            llm.step()
        return [request.tokens.tolist() for request in asked]

    assert led(work) == [dkv.infill(whole, ids, seed=2, **SETTINGS).sequences[0].tolist() for ids in texts]


@pytest.mark.parametrize(
    ("settings", "asked"), [({"temperature": 0}, {"logprobs": True}), ({"kv_cache_dtype": "int8"}, {})]
)
def test_what_else_is_asked_for(settings, asked):
    """Of the `LLM`, and of each request."""
    settings = {**SETTINGS, **settings}

    def work(llm):
        requests = [llm.add(ids, max_new_tokens=6, seed=3, **asked) for ids in prompts(3)]
        while llm.running or llm.waiting:
            llm.step()
        return [(r.tokens.tolist(), None if r.logprobs is None else r.logprobs.tolist()) for r in requests]

    model = dkv.load(FOLDER, dtype="float64", device="cpu")
    whole = work(dkv.LLM(model, max_length=24, max_slots=48, **settings))
    for (tokens, logprobs), (expected, right) in zip(led(work, **settings), whole, strict=True):
        assert tokens == expected and logprobs == (right and pytest.approx(right, rel=1e-6))


def test_seeds_that_are_not_given_are_told(alone):
    (request,) = led(lambda llm: llm.generate(prompts(1), max_new_tokens=6, progress=False))
    assert request.tokens.tolist() == alone(prompts(1)[0], max_new_tokens=6, seed=request.config.seed)


def test_an_error_of_one_process_alone_is_no_request_s(monkeypatch):
    """Else the others would wait for it in the middle of a step."""

    def step(engine):
        if engine.ranks.rank == 0:
            raise torch.OutOfMemoryError("full")
        engine.ranks.first(torch.zeros(1))

    monkeypatch.setattr("dkv.engine.continuous.ContinuousBatch.step", step)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        led(lambda llm: llm.generate(prompts(1), max_new_tokens=6, progress=False))


@pytest.mark.parametrize("rows", [0, 5])
def test_map_gives_all_processes_the_records(rows, tmp_path):
    """The first one alone reads what is asked and writes."""
    asked = [{"id": i, "prompt": ids[0].tolist(), "max_new_tokens": 4 + i} for i, ids in enumerate(prompts(rows))]
    how = {**SETTINGS, "seed": 7, "max_length": 24, "max_slots": 48, "progress": False}

    def call(ranks):
        model = dkv.load(FOLDER, dtype="float64", ranks=ranks)
        return dkv.map(model, asked if ranks.rank == 0 else [], out=tmp_path, **how)

    expected = dkv.map(dkv.load(FOLDER, dtype="float64", device="cpu"), asked, **how)
    first, second = together(2, call)
    assert first == second == together(2, call)[1] and len(first) == rows
    assert [record["tokens"] for record in first] == [record["tokens"] for record in expected]


def test_map_refuses_devices_of_processes_that_share_a_model(monkeypatch):
    monkeypatch.setattr("dkv.serving.mapping.met", lambda: Team(2).ranks[0])
    with pytest.raises(ValueError, match="devices has a model on each, and processes that have met share one"):
        dkv.map("tiny", ["1+1="], devices="cpu,cpu")


@pytest.mark.parametrize("call", ["join", "step"])
def test_any_error_of_one_process_ends_all(monkeypatch, call):
    """In the middle of a step, or before it, where the others have none."""
    made = getattr(ContinuousBatch, call)

    def failing(batch, *given):
        if batch.ranks.rank == 1:
            raise ValueError("of this process alone")
        return made(batch, *given)

    monkeypatch.setattr(ContinuousBatch, call, failing)
    with pytest.raises(ValueError, match="of this process alone"):
        led(lambda llm: llm.generate(prompts(1), max_new_tokens=6, progress=False))


def test_a_process_that_has_gone_is_told_once(monkeypatch):
    def work(llm):
        told = []
        llm.on_failed = lambda error: told.append(str(error))
        llm.add([1, 2], max_new_tokens=4)
        llm._ranks.told, before = lambda *_: (_ for _ in ()).throw(Lost("gone", None)), llm._ranks.told
        with pytest.raises(Lost):
            llm.step()
        llm._ranks.told = before
        return told

    assert led(work) == ["gone"]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def serving(port: int):
    """`dkv serve` by two processes that answers."""
    limits = ("--max-length", 160, "--max-slots", 480, "--cache", "decode")
    run = started(2, "-m", "dkv", "serve", "tiny", "--device", "cpu", "--dtype", "float64", "--port", port, *limits)
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return run
        except httpx.HTTPError:
            time.sleep(0.1)
    raise TimeoutError([process.kill() or process.communicate() for process in run])


def ask(port: int, number: int, new: int) -> httpx.Response:
    body = {"model": "tiny", "prompt": f"{number}+{number + 1}=", "max_tokens": new, "seed": number, "temperature": 0.5}
    return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=120)


@pytest.mark.slow
def test_a_server_of_two_processes_answers_and_drains():
    port, model, tokenizer = free_port(), dkv.load("tiny", dtype="float64", device="cpu"), dkv.load_tokenizer("tiny")
    run = serving(port)
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, port, number, 30 + number) for number in range(6)]
        time.sleep(0.5)
        for process in run:  # as torchrun does
            process.send_signal(signal.SIGTERM)
        answers = [one.result() for one in asked]
    said = [process.communicate(timeout=60)[1] for process in run]
    assert [process.returncode for process in run] == [-signal.SIGTERM, 0] and said[1] == ""
    for number, response in enumerate(answers):
        ids = tokenizer(f"{number}+{number + 1}=", return_tensors="pt").input_ids
        call = {"max_new_tokens": 30 + number, "seed": number, "temperature": 0.5, "cache": "decode"}
        output = dkv.generate(model, ids, eos_token_id=end_ids(tokenizer, model.spec), **call)
        text = answer(tokenizer, model.spec, output.sequences[0, ids.shape[1] :].tolist())
        assert response.json()["choices"][0]["text"] == text


@pytest.mark.slow
def test_a_server_ends_when_another_process_is_killed():
    port = free_port()
    run = serving(port)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask, port, number, 120) for number in range(3)]
        time.sleep(1)
        os.kill(run[1].pid, signal.SIGKILL)
        time.sleep(0.1)
        run[0].send_signal(signal.SIGTERM)  # as torchrun does
        codes = [one.result().status_code for one in asked]
    said = run[0].communicate(timeout=60)[1]
    assert run[0].returncode in (2, -signal.SIGTERM) and set(codes) <= {200, 503}
    assert said.endswith("dkv serve: error: " + WITHOUT.format(1))


@pytest.mark.slow
def test_a_data_set_is_answered_by_two_processes(tmp_path):
    lines = [{"id": i, "prompt": f"{i}+{i}=", "max_new_tokens": 10 + i} for i in range(5)] + [{"id": 9, "prompt": "?"}]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = []
    # The third time nothing is left.
    for count in (1, 2, 2):
        out = tmp_path / str(count)
        options = ("--devices", "cpu", "--dtype", "float64", "--seed", 4, "--max-slots", 90, "--max-length", 40)
        command = ("-m", "dkv", "run", "tiny", "--data", data, "--out", out, *options)
        for number, process in enumerate(started(count, *command)):
            _, errors = process.communicate(timeout=120)
            assert process.returncode == (1 if number == 0 else 0), errors
        records = map(json.loads, (out / "results.jsonl").read_text().splitlines())
        found.append({r["id"]: (r.get("tokens"), r.get("error")) for r in records if "id" in r})
    assert found[0] == found[1] == found[2] and len(found[0]) == 6
