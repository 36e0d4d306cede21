"""`dkv run`: killed, ended and interrupted at any moment, nothing is lost and nothing done twice."""

import json
import os
import random
import shlex
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

import dkv
from dkv.cli import build_parser
from dkv.cli import run as module
from dkv.serving.job import derived_seed
from dkv.tools.text import answer, encode, end_ids
from tests.processes import FORKS, Fork, python

RESULTS = Path("out") / "results.jsonl"
NEW, SEED = 24, 5


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """fork(folder, "dkv", "run", ...) -> Fork, whose streams are new."""

    def begun(folder, *words):
        for name in ("out", "err"):
            (folder / f"{name}.txt").unlink(missing_ok=True)
        return Fork(server, folder, tuple(map(str, words)))

    with python(tmp_path_factory.mktemp("forks"), FORKS) as server:
        yield begun
        server.stdin.close()


def write_data(folder: Path, count: int) -> list[dict]:
    rng = random.Random(count)
    rows = []
    for number in range(count):
        row = {"id": f"r{number}" if number % 3 else number, "prompt": f"{rng.randrange(10**9)}+"}
        if number % 2:
            row["max_new_tokens"] = rng.randrange(1, NEW)
        rows.append(row)
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def command(model: Path, *more: object) -> list[object]:
    """A run of three rows at a time, whose tokens are drawn."""
    what = ["dkv", "run", model, "--data", "in.jsonl", "--out", "out", "--max-new-tokens", NEW, "--max-slots", 3 * 40]
    return [*what, "--temperature", 1, "--seed", SEED, *more]


def written(folder: Path) -> list[dict]:
    """The whole lines of the results."""
    with suppress(FileNotFoundError):
        return list(map(json.loads, (folder / RESULTS).read_text().split("\n")[:-1]))
    return []


def wait_for(folder: Path, count: int, running: Fork) -> None:
    """Until there are so many results, or the process has ended."""
    deadline = time.monotonic() + 120
    while len(written(folder)) < count and os.path.exists(f"/proc/{running.pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def check_all(folder: Path, model: Path, rows: list[dict]) -> None:
    """Every line has what it gets alone, once."""
    found = {record["id"]: record for record in written(folder)}
    assert len(found) == len(rows) == len(written(folder))
    loaded, tokenizer = dkv.load(model), dkv.load_tokenizer(str(model))
    ends = end_ids(tokenizer, loaded.spec)
    for row in rows:
        ids, _ = encode(tokenizer, [row["prompt"]])
        seed, new = derived_seed(SEED, row["id"]), row.get("max_new_tokens", NEW)
        alone = dkv.generate(loaded, ids, max_new_tokens=new, temperature=1.0, seed=seed, eos_token_id=ends)
        record = found[row["id"]]
        assert record["tokens"] == alone.sequences[0, ids.shape[1] :].tolist() and record["seed"] == seed
        assert record["text"] == answer(tokenizer, loaded.spec, record["tokens"])


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path, fork, folder):
    rows = write_data(tmp_path, 14)
    running = fork(tmp_path, *command(folder))
    wait_for(tmp_path, 3, running)
    assert running.ended(signal.SIGKILL)[0] == -signal.SIGKILL
    kept = written(tmp_path)
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"id": "r1", "line": 2, "to')
    code, out, err = fork(tmp_path, *command(folder)).ended()
    assert code == 0 and out.startswith(f"{RESULTS}: 14 answers, 0 failed; ")
    assert f"{len(kept)} of 14 lines are done already" in err and 3 <= len(kept) < 14
    assert written(tmp_path)[: len(kept)] == kept
    check_all(tmp_path, folder, rows)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_run_that_is_ended_says_what_is_kept(tmp_path, fork, folder, number, code):
    write_data(tmp_path, 30)
    running = fork(tmp_path, *command(folder))
    wait_for(tmp_path, 1, running)
    found, _, err = running.ended(number)
    kept = len(written(tmp_path))
    how = "interrupted" if number == signal.SIGINT else "ended by SIGTERM"
    said = f"dkv run: {how}; {kept} line{'s' * (kept > 1)} kept in {RESULTS}: repeat the command to go on\n"
    assert found == code and err.endswith(said) and 1 <= kept < 30


@pytest.mark.slow
def test_killed_again_and_again_at_any_moment(tmp_path, fork, folder):
    rows, rng, kills, seen = write_data(tmp_path, 150), random.Random(0), 0, []
    while True:
        running = fork(tmp_path, *command(folder))
        wait_for(tmp_path, len(seen) + rng.randrange(20), running)
        time.sleep(rng.random() / 20)
        code = running.ended(signal.SIGKILL)[0]
        now = written(tmp_path)
        # What was there stays as it was.
        assert now[: len(seen)] == seen
        seen = now
        if code != -signal.SIGKILL:
            break
        kills += 1
    assert code == 0 and kills > 5
    check_all(tmp_path, folder, rows)


def test_two_processes_share_the_lines(tmp_path, fork, folder):
    rows = write_data(tmp_path, 30)
    code, out, err = fork(tmp_path, *command(folder, "--devices", "cpu,cpu")).ended()
    assert (code, out.partition(";")[0]) == (0, f"{RESULTS}: 30 answers, 0 failed"), err
    check_all(tmp_path, folder, rows)


def children(pid: int) -> list[int]:
    """Processes that have a device: those that Python has spawned."""
    return [
        int(found)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for found in (task / "children").read_text().split()
        if "spawn_main" in Path(f"/proc/{found}/cmdline").read_text()
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whom", "number"), [("one", signal.SIGKILL), ("first", signal.SIGKILL), ("group", signal.SIGINT)]
)
def test_a_process_that_dies_ends_the_run_and_a_repeat_goes_on(tmp_path, fork, folder, whom, number):
    rows = write_data(tmp_path, 80)
    running = fork(tmp_path, *command(folder, "--devices", "cpu,cpu"))
    wait_for(tmp_path, 10, running)
    workers = children(running.pid)
    assert len(workers) == 2
    if whom == "one":
        os.kill(workers[1], number)
        code, _, err = running.ended()
        said = f"dkv run: error: the process of cpu was ended by {number.name}; {len(written(tmp_path))} lines kept in"
        assert code == 2 and f"{said} {RESULTS}: repeat the command to go on" in err
    else:
        # A terminal's interrupt meets all of a group.
        for worker in workers if whom == "group" else ():
            os.kill(worker, number)
        code, _, err = running.ended(number)
        assert code == (130 if number == signal.SIGINT else -number)
    # None of them is left.
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "Traceback" not in err and "leaked" not in err
    # With another number of processes.
    assert fork(tmp_path, *command(folder)).ended()[0] == 0
    check_all(tmp_path, folder, rows)


def test_another_process_in_the_folder_is_refused(tmp_path, fork, folder, run, monkeypatch):
    write_data(tmp_path, 16)
    running = fork(tmp_path, *command(folder))
    wait_for(tmp_path, 1, running)
    os.kill(running.pid, signal.SIGSTOP)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*command(folder)[1:])
    assert (code, out) == (2, "") and "results.jsonl: another process is at work on it: wait for its end" in err
    os.kill(running.pid, signal.SIGCONT)
    assert running.ended()[0] == 0 and len(written(tmp_path)) == 16


def test_lines_that_fail_are_told_and_change_the_exit_code(tmp_path, run, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = ["not json", '{"id": 0, "prompt": "1"}', '{"id": "long", "prompt": "%s"}' % ("1" * 300), '{"id": "x"}']
    write_data(tmp_path, 5)
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write("\n".join([*bad, '{"id": "last", "prompt": "h"}']))
    code, out, err = run(*command(folder)[1:])
    assert code == 1 and out.startswith(f"{RESULTS}: 5 answers, 5 failed; ")
    said = [
        "line 6: it is not JSON (",
        "line 7 (id 0): the id 0 is that of line 1, too",
        'line 8 (id "long"): 300 tokens and the answer need 324 slots, and the model has 256',
        'line 9 (id "x"): it must have prompt or messages, and has neither',
        "line 10 (id \"last\"): the model has no token for 'h'",
    ]
    lines = err.splitlines()
    assert len(lines) == 5 and all(line.startswith(f"dkv run: {one}") for line, one in zip(lines, said, strict=True))
    failed = {record["line"]: record["id"] for record in written(tmp_path) if "error" in record}
    assert failed == {6: None, 7: 0, 8: "long", 9: "x", 10: "last"}
    before = (tmp_path / RESULTS).read_text()
    assert run(*command(folder)[1:]) == (
        *(1, f"{RESULTS}: 5 answers, 5 failed\n"),
        "dkv run: 10 of 10 lines are done already\n",
    )
    assert (tmp_path / RESULTS).read_text() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--seed", 6), "out/results.jsonl was made with seed 5, not 6: give another --out, or remove the file"),
        (("--cache", "decode"), "was made with cache {'name': 'none'}, not {'name': 'decode'"),
        (("--data", "nowhere.jsonl"), "--data: there is no file nowhere.jsonl"),
        (("--data", "other.jsonl"), "was made with data '3 lines, "),
        (("--out", "/dev/null/x"), "--out: cannot write"),
        (("--data", RESULTS), f"--out: {RESULTS} is that of --data, too: give another place"),
        (("--devices", "0"), "devices must be at least 1"),
        (("--devices", "cpu,"), "devices must be names such as cuda:0,cuda:1, or a number"),
        (("--temperature", -1), "temperature must be"),
        (("--schedule", "speculative"), 'schedule="speculative" does not go with'),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(tmp_path, run, folder, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path, 3)
    (tmp_path / "other.jsonl").write_text('{"prompt": "1"}\n')
    assert run(*command(folder)[1:])[0] == 0
    lines = (tmp_path / RESULTS).read_text().splitlines(keepends=True)
    (tmp_path / RESULTS).write_text("".join(lines[:2]))
    monkeypatch.setattr("dkv.load", lambda *_, **__: pytest.fail("a model was loaded"))
    code, out, err = run(*command(folder, *words)[1:])
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1 + ("already" in err)


def test_the_examples_parse():
    for line in module.EXAMPLES.splitlines():
        if line.startswith("  dkv "):
            assert build_parser().parse_args(shlex.split(line)[1:]).run is module.run


def test_an_empty_file_is_told(tmp_path, run, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text("\n")
    code, _, err = run(*command(folder)[1:])
    assert code == 2 and "in.jsonl is empty: give a JSON object a line" in err and not (tmp_path / RESULTS).exists()
