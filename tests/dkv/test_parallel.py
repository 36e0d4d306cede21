"""Processes that share a model: the tokens of one process, and an end for all when one of them ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dkv.parallel
from dkv import cli
from tests.dkv.engine.test_rows import decoding, prompts
from tests.dkv.held_out import made
from tests.dkv.sharing import PLAIN, ROOT, WITHOUT, cases, found, small_gemma, started
from tests.together import Team, together

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def check(kind: str, gemma, count: int = 2) -> None:
    """Processes with gloo give in every case what one gives."""
    processes = started(count, "-m", "tests.dkv.sharing", kind, gemma)
    # Worked out meanwhile.
    expected = {case[0]: found(case) for case in cases(kind, gemma)}
    said = [process.communicate(timeout=1500) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, said
    out = said[0][0]
    told = dict(json.loads(line) for line in out.splitlines())
    assert told.keys() == expected.keys()
    if kind != "held out":
        seeds = told.pop("seeds"), expected.pop("seeds")
        assert len(seeds[0]) == len(seeds[1])
    assert [name for name in told if told[name] != expected[name]] == []
    done = sum(tokens is not None for tokens in expected.values())
    # Block-causal models refuse most policies.
    assert done > (0.4 if kind == "held out" else 0.8) * len(expected)


def test_two_processes_give_the_tokens_of_one(tmp_path):
    check("quick", small_gemma(tmp_path / "gemma"))


@pytest.mark.slow
def test_two_processes_give_the_tokens_of_one_broadly(tmp_path):
    check("sweep", small_gemma(tmp_path / "gemma"))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "seed"), [(2, 11), (2, 12), (4, 13)])
def test_held_out_models_of_every_family(tmp_path, count, seed):
    made(tmp_path, seed, count)
    check("held out", tmp_path, count)


class Shared:
    """A model as it is, and as three threads share it."""

    def __init__(self, family: str, count: int):
        self.team = Team(count)
        self.whole = dkv.load(ROOT / PLAIN[family], dtype="float64", device="cpu")
        self.parts = [dkv.load(ROOT / PLAIN[family], dtype="float64", ranks=ranks) for ranks in self.team.ranks]

    def same(self, *given, **call) -> bool:
        """Whether all threads give what the whole model gives, from as many slots."""
        expected = dkv.generate(self.whole, *given, **call)
        found = self.team(lambda ranks: dkv.generate(self.parts[ranks.rank], *given, **call))
        counts = {output.stats.computed_slots for output in (*found, expected)}
        return len(counts) == 1 and all(torch.equal(output.sequences, expected.sequences) for output in found)


@pytest.fixture(scope="module")
def shared():
    return {"llada": Shared("llada", 4), "dream": Shared("dream", 2)}


def check_any(shared, padded, name, how, batch, eos):
    rows, budgets, seeds = batch
    ids, mask = (x.long() for x in padded(rows))
    call = {**how, "eos_token_id": eos or None, "max_new_tokens": budgets, "seed": seeds}
    assert shared[name].same(ids, mask, **call)


# Without a prompt all slots are alike, and rounding decides which is filled first.
ANY = (st.sampled_from(["llada", "dream"]), decoding(), prompts(at_least=1), st.lists(st.integers(0, 61), max_size=8))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(*ANY)
def test_any_settings(shared, padded, name, how, batch, eos):
    check_any(shared, padded, name, how, batch, eos)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(*ANY)
def test_any_settings_broadly(shared, padded, name, how, batch, eos):
    check_any(shared, padded, name, how, batch, eos)


# What a process does whose number is the first argument, once all have met: `{here}` in the middle of what it shares.
WORK = """
import os, signal, sys, time
from dkv.common import process
process.begin("dkv")
import torch
from dkv import parallel
def work():
    ranks = parallel.start("cpu")
    for number in range(10**6):
        if number == 20 and ranks.rank == {who}:
            {here}
        ranks.sum_(torch.ones(3))
process.run(work)
"""
KILL, INTERRUPT = "os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGINT)"
FULL, OF_SECOND = "dkv: error: the disk is full\n", "process 1 of 2 has failed: "
# Who does what, and then the codes and what is said.
ENDS = [
    (1, 'raise ValueError("the disk is full")', (2, 2), (f"dkv: error: {OF_SECOND}the disk is full\n", "")),
    (1, KILL, (2, -9), ("dkv: error: " + WITHOUT.format(1), "")),
]
OTHERS = [
    (0, 'raise ValueError("the disk is full")', (2, 2), (FULL, "")),
    (0, KILL, (-9, 2), ("", "dkv: error: " + WITHOUT.format(0))),
    (0, INTERRUPT, (130, 2), ("dkv: interrupted\n", "")),
    (1, INTERRUPT, (2, 130), (f"dkv: error: {OF_SECOND}interrupted\n", "")),
    (0, "raise BrokenPipeError", (141, 2), ("", "")),
]


def check_ends(ends) -> None:
    """Each way by which a process ends, all at the same time."""
    runs = [started(2, "-c", WORK.format(who=who, here=here)) for who, here, *_ in ends]
    for (_, here, *expected), run in zip(ends, runs, strict=True):
        said = [process.communicate(timeout=60) for process in run]
        codes, errors = tuple(process.returncode for process in run), tuple(errors for _, errors in said)
        assert [codes, errors] == expected and not any(out for out, _ in said), (here, codes, said)


def test_where_one_process_ends_all_end_and_the_reason_is_said_once():
    check_ends(ENDS)


@pytest.mark.slow
def test_other_ends():
    check_ends(OTHERS)


@pytest.mark.slow
def test_a_fault_of_one_process_shows_its_trace():
    (_, first), (_, second) = (
        run.communicate(timeout=60) for run in started(2, "-c", WORK.format(who=1, here="{}[9]"))
    )
    assert first == f"dkv: error: {OF_SECOND}dkv: KeyError: 9\n"
    assert "Traceback" in second and second.endswith("KeyError: 9\n")


def torchrun(*command: object) -> subprocess.Popen:
    """Two processes that torchrun starts, in a group of their own."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", "localhost:0", "-m", *map(str, command)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=ROOT, env=env, start_new_session=True, **pipes)


PROMPT = "#..##.#...#.##..#.#....##.#="
GENERATE = ("generate", "--device", "cpu", "--dtype", "float64", "--max-new-tokens", 112, "--cache", "decode", PROMPT)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["dkv", "dkv.cli"])
def test_torchrun_gives_the_answer_of_one_process(module, capsys):
    out, errors = torchrun(module, *GENERATE).communicate(timeout=120)
    assert cli.main([*map(str, GENERATE)]) == 0
    assert out == capsys.readouterr().out and errors.count("error") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("generate", "--model", "tiny-text", "a"), "5 key heads cannot be split over 2 processes: start 5 of them"),
        (("generate", "--file", "nowhere"), "nowhere: No such file or directory"),
        (("generate", "--steps", "x"), "argument --steps: invalid int value: 'x'"),
        (("bench",), "dkv bench is one process, not several: start it without torchrun"),
    ],
)
def test_torchrun_says_an_error_once(command, said):
    errors = torchrun("dkv", *command).communicate(timeout=120)[1]
    assert errors.count(f"dkv {command[0]}: error: {said}") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_torchrun_ends_within_seconds(number, tmp_path):
    """Ctrl-C in a terminal, which all get; and a process that is killed in the middle of a generation."""
    prompts = tmp_path / "prompts"
    prompts.write_text(f"{PROMPT}\n" * 64)
    run = torchrun("dkv", *GENERATE[:-1], "--no-stream", "--lines", "--file", prompts)
    time.sleep(12)
    began = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(run.pid, number)
    else:
        children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), number)
    out, errors = run.communicate(timeout=60)
    assert time.monotonic() - began < 30 and run.returncode and not out
    said = "dkv generate: interrupted\n" if number == signal.SIGINT else "SIGKILL"
    assert said in errors


def test_what_processes_were_given_is_compared():
    def call(ranks):
        ranks.check_same(input_ids=torch.tensor([1, 2]), cache={"a": 3})
        with pytest.raises(ValueError, match=r"^input_ids, seed: the processes were given different ones"):
            ranks.check_same(input_ids=(torch.tensor([1, 2 + (ranks.rank == 2)]),), steps=3, seed=ranks.rank)
        return ranks.from_first(lambda: ranks.rank + 7), ranks.first(torch.tensor([ranks.rank])).item()

    assert together(3, call) == [(7, 0)] * 3


OWN = """
import sys
import torch, torch.distributed as dist
import dkv
dist.init_process_group("gloo")
with dkv.parallel.start("cpu") as ranks:
    assert dkv.parallel.start() is ranks and dkv.parallel.met() is ranks
    print(ranks.sum_(torch.tensor([ranks.rank + 1])).item())
assert dist.is_initialized() and dkv.parallel.met() is None
"""


@pytest.mark.slow
def test_a_group_that_is_there_is_used_and_left():
    assert [process.communicate(timeout=60) for process in started(2, "-c", OWN)] == [("3\n", "")] * 2


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"RANK": None}, None, r"RANK is not set.*torchrun --nproc-per-node 2"),
        ({}, "cuda:1", "'cuda:1' is one for all processes: give 'cuda'"),
        ({"WORLD_SIZE": "two"}, "cpu", "WORLD_SIZE must be a whole number, got 'two'"),
        ({"MASTER_PORT": ""}, "cpu", "MASTER_PORT must be a whole number, got ''"),
        ({"RANK": "2"}, "cpu", "RANK=2 must be below WORLD_SIZE=2"),
        pytest.param({}, "cuda", "has no GPU that PyTorch sees: give 'cpu'", marks=WITHOUT_GPU),
    ],
)
def test_a_process_that_is_none_of_several_is_told_why(monkeypatch, changes, device, message):
    found = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", **changes}
    for name, value in found.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        dkv.parallel.start(device)


def test_a_place_to_meet_that_is_taken_is_named(monkeypatch):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        where = "127.0.0.1", str(one.getsockname()[1])
        for name, value in zip(("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), ("0", "2", *where), strict=True):
            monkeypatch.setenv(name, value)
        with pytest.raises(dkv.parallel.Lost, match=f"cannot meet at {':'.join(where)}: .*EADDRINUSE"):
            dkv.parallel.start("cpu")
