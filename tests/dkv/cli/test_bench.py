"""`dkv bench`: its arguments, its files, and a real run on the smallest shape."""

import csv
import json
import os
import shlex

import pytest

from dkv.bench import plots
from dkv.bench.lineup import LINEUP
from dkv.bench.options import Options
from dkv.bench.shapes import SHAPES
from dkv.bench.speed import blocks, compare
from dkv.cli import bench, bench_checks, build_parser
from dkv.models.bundled.tasks import TASKS

SIZES = ("--shape", "d128x4", "--layers", 1, "--prompt", 8, "--new", 8, "--threads", 1)
SMALL = ("--shape", "d128x4", "--layers", 1, "--prompt", 8, "--new", 8, "--rounds", 1, "--threads", 1)
TWO = ("--policies", "decode 8", "plain")


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


def test_names_are_those_of_the_benchmark():
    assert tuple(SHAPES) == bench.SHAPES
    assert bench_checks.MULTIPLE["blocks"] == blocks.BLOCK and set(bench.USES) == {"comparison", *bench.OTHERS}
    assert (TASKS["balance"].new_tokens, Options.new) == bench_checks.NEW and set(bench_checks.NAMES) <= set(LINEUP)
    for kind, batches, changes in bench.ALL.values():
        assert kind in ("comparison", *bench.OTHERS) and min(batches) >= 1
        assert set(changes.get("policies", ())) <= set(LINEUP)
        assert set(changes) <= {*bench.SETTINGS, "policies", "rules", "eager", "model"}


def test_the_examples_parse():
    for line in bench.EXAMPLES.splitlines():
        if line.startswith("  dkv "):
            words = shlex.split(line.partition("      ")[0])
            assert build_parser().parse_args(words[1:]).run is bench.run


def test_run(run, tmp_path):
    files = tmp_path / "new" / "a.json", tmp_path / "a.csv", tmp_path / "plots"
    code, out, err = run("bench", *SMALL, *TWO, "--json", files[0], "--csv", files[1], "--plots", files[2])
    assert code == 0
    # A line per measurement, as there is no terminal: two policies in two ways, warmed up, timed, and their memory.
    said = [line.partition(", 0 s")[0] for line in err.splitlines() if "warning" not in line]
    assert [line.partition(" (")[0] for line in said] == [f"dkv bench: {i} of 12 runs" for i in range(1, 13)]
    assert said[0].startswith("dkv bench: 1 of 12 runs (warm-up of plain)")
    assert "(round 1 of 1: decode 8, eager)" in said[7] and "(memory of decode 8)" in said[10]
    lines = out.splitlines()
    assert lines[0].startswith("d128x4, 1 layer (0.5 M parameters, float32) on ")
    assert lines[2] == "8 + 8 slots, steps: 8, batch: 1, rounds: 1"
    assert [line[:8].strip() for line in lines[4:9]] == ["policy", "plain", "eager", "decode 8", "eager"]
    assert any(line.startswith("Fastest for 8 + 8 slots at batch 1: decode 8, ") for line in lines)
    assert "One round cannot tell whether the cache pays: give --rounds 3." in lines
    assert lines[-2:] == [str(files[2] / name) for name in ("speed.png", "steps.png")]

    found = json.loads(files[0].read_text())
    assert found["facts"]["command"].startswith("dkv bench --shape d128x4 --layers 1 ")
    assert {"date", "torch", "dkv", "threads", "processor", "model", "parameters"} <= set(found["facts"])
    rows = found["comparison"]["rows"]
    assert [(row["policy"], row["way"]) for row in rows] == [
        (policy, way) for policy in ("plain", "decode 8") for way in ("dkv", "eager")
    ]
    assert all(row["same_tokens"] == 1 for row in rows if row["way"] == "eager")
    with open(files[1], newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["speed"]) for row in table] == [row["speed"] for row in rows]
    assert all(path.stat().st_size > 1000 for path in files[2].iterdir())


def test_a_sweep_has_a_table_per_batch(run, tmp_path):
    path = tmp_path / "a.json"
    code, out, _ = run("bench", *SMALL, *TWO, "--no-eager", "--batch", 1, 2, "--json", path, "--plots", tmp_path)
    rows = json.loads(path.read_text())["comparison"]["rows"]
    assert code == 0 and [(row["policy"], row["batch"]) for row in rows] == [
        ("plain", 1),
        ("decode 8", 1),
        ("plain", 2),
        ("decode 8", 2),
    ]
    assert all(f"batch: {batch}, rounds: 1" in out for batch in (1, 2)) and "eager  " not in out
    assert (tmp_path / "batch.png").exists()


@pytest.fixture
def measured(monkeypatch):
    """Stand-ins for the measurements: what they were asked, and a row each."""
    asked = []

    def load(name):
        class Module:
            @staticmethod
            def measure(options):
                asked.append((name.rpartition(".")[2], options))
                return {"rows": [{"name": name}], "refused": {}}

            @staticmethod
            def one_batch(rows):
                return f"{len(rows)} line"

            @staticmethod
            def table(found):
                return f"table of {found['rows'][0]['name']}"

        return Module

    monkeypatch.setattr(bench, "import_module", load)
    monkeypatch.setattr(plots, "draw", lambda found, folder, prefix="": [])
    return asked


def test_tables_are_printed_again_from_their_files(run, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    _, out, _ = run("bench", *SMALL, "--policies", "prefill", "--batch", 1, 2, "--json", path)
    (line,) = (line for line in out.splitlines() if line.startswith("No eager baseline"))
    assert line.startswith("No eager baseline for prefill: cache must be ") and "got" not in line
    monkeypatch.setattr(compare, "measure", lambda options: pytest.fail("the comparison ran"))
    assert run("bench", "--show", path) == (0, out, "")
    _, out, _ = run("bench", *SIZES, *TWO, "--memory", "--no-eager", "--json", path)
    assert run("bench", "--show", path) == (0, out, "")
    older = json.dumps({"facts": json.loads(path.read_text())["facts"], "weights": {"rows": []}})
    broken = [(text, "has no figures") for text in ("[]", "{", older)]
    for text, message in (*broken, (None, "there is no file")):
        path.unlink() if text is None else path.write_text(text)
        code, out, err = run("bench", "--show", path)
        assert (code, out) == (2, "") and err.startswith("dkv bench: error: --show: ") and message in err


def test_other_measurements_take_the_place_of_the_comparison(run, tmp_path, measured):
    path = tmp_path / "a.json"
    code, out, _ = run("bench", *SIZES, "--floor", "--memory", "--batch", 3, "--json", path)
    assert code == 0 and out.endswith("\ntable of dkv.bench.speed.floor\n\ntable of dkv.bench.speed.memory\n")
    assert [(name, options.batch, options.prompt, options.new) for name, options in measured] == [
        ("floor", 3, 8, 8),
        ("memory", 3, 8, 8),
    ]
    assert list(json.loads(path.read_text())) == ["facts", "floor", "memory"]


def test_all_writes_a_file_per_measurement(run, tmp_path, measured):
    code, out, err = run("bench", "--all", "--shape", "d128x4", "--layers", 1, "--out", tmp_path / "new")
    assert (code, err) == (0, "")
    assert sorted(path.stem for path in (tmp_path / "new").iterdir()) == sorted(bench.ALL)
    assert [(name, o.name, o.prompt, o.batch, o.eager is None) for name, o in measured] == [
        ("compare", "d128x4, 1 layer", 128, 1, False),
        ("compare", "d128x4, 1 layer", 896, 1, True),
        *(("compare", "d128x4, 1 layer", 128, batch, False) for batch in (1, 2, 4)),
        ("floor", "d128x4, 1 layer", 128, 1, False),
        ("growth", "d128x4, 1 layer", 64, 1, True),
        ("memory", "d128x4, 1 layer", 128, 1, False),
        ("blocks", "d128x4, 1 layer", 128, 1, False),
        ("blocks", "tiny", 63, 1, False),
    ]
    assert json.loads((tmp_path / "new" / "memory.json").read_text())["facts"]["model"] == "d128x4, 1 layer"
    assert out.count("\n== ") == len(bench.ALL)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policies", "decode 9"], "argument --policies: invalid choice: 'decode 9'"),
        (["--shape", "no"], "argument --shape: invalid choice: 'no'"),
        (["--batch", "1", "0"], "--batch must be at least 1, got 0"),
        (["--batch", "1", "1000000000"], "--batch must be at most 4096, got 1000000000"),
        (["--layers", "1000000000"], "--layers must be at most 1024, got 1000000000"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--threads", "-1"], "--threads must be at least 1, got -1"),
        (["--model", "x", "--shape", "d128x4"], "give --model or --shape, not both"),
        (["--layers", "2"], "--layers goes with --shape"),
        (["--prompt", "8"], "--prompt goes with --shape or another --model"),
        (["--all"], "--all writes files: give --out DIR"),
        (["--out", "x"], "--out goes with --all"),
        (["--all", "--out", "x", "--no-eager"], "--all has sizes and outputs of its own: leave out --no-eager"),
        (["--all", "--out", "x", "--growth"], "--all has sizes and outputs of its own: leave out --growth"),
        (["--all", "--out", "x", "--model", "tiny"], "--all needs longer canvases than tiny has"),
        (["--new", "61"], "--new must be at least 62 with tiny, the length of its answers, got 61"),
        (
            ["--blocks", "--shape", "d128x4", "--new", "16"],
            "--blocks fills blocks of 32 slots: --new must be a multiple of 32, such as 32, got 16",
        ),
        (
            ["--floor", "--blocks", "--shape", "d128x4", "--new", "100"],
            "--blocks fills blocks of 32 slots: --new must be a multiple of 32, such as 96, got 100",
        ),
        (["--blocks", "--new", "16"], "--blocks fills blocks of 32 slots: --new must be a multiple of 32, such as 64"),
        (
            ["--floor", "--shape", "d128x4", "--new", "2"],
            "--floor needs a step that reuses the cache: --new must be at least 3, got 2",
        ),
        (["--shape", "d128x4", "--new", "4", "--steps", "9"], "--steps must be at most --new"),
        (["--steps", "65"], "--steps must be at most --new, as every step fills a slot, got 65 steps for 64"),
        (["--growth", "--new", "64"], "--new has no effect on --growth: leave it out"),
        (["--floor", "--blocks", "--steps", "8"], "--steps has no effect on --floor and --blocks: leave it out"),
        (["--memory", "--rounds", "5"], "--rounds has no effect on --memory"),
        (["--growth", "--policies", "plain"], "--policies has no effect on --growth"),
        (["--blocks", "--policies", "decode 8"], "--policies 'decode 8' is not among what is compared here: plain, "),
        (["--serve", "--steps", "8"], "--steps has no effect on --serve: leave it out"),
        (["--serve", "--policies", "pd 8"], "--policies 'pd 8' is not among what is compared here: decode 8, dual"),
        (["--policies", "suffix 96"], "--policies 'suffix 96' is not among what is compared here: plain, "),
        (["--blocks", "--batch", "2"], "--blocks takes one prompt, as published: --batch must be 1, got 2"),
        (
            ["--shape", "d128x4", "--layers", "1", "--prompt", "4096"],
            "a prompt of 4096 tokens and 128 new slots need 4224 positions, and d128x4, 1 layer has 4096",
        ),
        (
            ["--shape", "d128x4", "--layers", "1", "--floor", "--growth", "--prompt", "4093", "--new", "3"],
            "a prompt of 4093 tokens and 64 new slots need 4157 positions",
        ),
        (
            ["--all", "--model", "tiny-dream", "--out", "x"],
            "a prompt of 896 tokens and 64 new slots need 960 positions",
        ),
        (["--shape", "d128x4", "--growth", "--batch", "1", "2"], "--growth takes one --batch, got 2"),
        (["--floor", "--growth", "--csv", "x"], "--csv holds the rows of one measurement"),
        (["--model", "no/such/folder"], "there is no folder no/such/folder"),
        (["--shape", "d128x4", "--device", "nowhere"], "device='nowhere' cannot be used here"),
    ],
)
def test_wrong_arguments(run, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "import_module", lambda name: pytest.fail(f"{name} was measured"))
    code, out, err = run("bench", *words)
    assert (code, out) == (2, "") and err.startswith(f"dkv bench: error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize("option", ["json", "csv", "plots"])
def test_outputs_that_cannot_be_written_are_found_first(run, tmp_path, monkeypatch, option):
    monkeypatch.setattr(bench, "build", lambda *args, **more: pytest.fail("a model was made"))
    (tmp_path / "file").write_text("")
    code, out, err = run("bench", f"--{option}", tmp_path / "file" / "x")
    assert (code, out) == (2, "") and err.startswith(f"dkv bench: error: --{option}: cannot write {tmp_path}/file/x")


def test_plots_need_matplotlib(run, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    message = "dkv bench: error: {} needs matplotlib: pip install 'dkv[bench]'\n"
    assert run("bench", "--plots", tmp_path) == (2, "", message.format("--plots"))
    assert run("bench", "--all", "--out", tmp_path) == (2, "", message.format("--all"))


def test_a_busy_machine_is_told(run, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (2.1, 9.0, 9.0))
    _, _, err = run("bench", "--model", "no/such/folder")
    warning = "dkv bench: warning: the machine is busy (load average 2.1 on 4 cores): figures will be off"
    assert err.splitlines()[0] == warning
    monkeypatch.setattr(os, "getloadavg", lambda: (2.0, 9.0, 9.0))
    assert "warning" not in run("bench", "--model", "no/such/folder")[2]
