"""Everything that is written goes through links, into FIFOs, and is not half written: each writer, and each option."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest
import torch

import dkv
from dkv.bench import plots, report
from dkv.bench.accuracy import quality
from dkv.bench.gpu import __main__ as gpu
from dkv.bench.gpu.report import Report
from dkv.cli import bench, eval, main
from dkv.common import files
from dkv.models.bundled import train as train_tiny
from dkv.models.export import save_model, save_tokenizer
from dkv.tools import trace

ROW = {
    "policy": "plain", "way": "dkv", "batch": 1, "prompt": 1, "new": 1, "steps": 1, "speed": 1.0, "slowest": 1.0,
    "fastest": 1.0, "computed_share": 1.0, "exact": None, "over_eager": None,
}  # fmt: skip


@pytest.fixture
def figure():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    return Figure()


@pytest.fixture
def found(llada):
    class Tokens:
        all_special_ids = ()

        def decode(self, ids, **_):
            return "".join(f" {i}" for i in ids)

    return trace.record(llada, Tokens(), torch.tensor([[5, 9]]), max_new_tokens=2, seed=0)


@pytest.fixture
def writers(build, found, figure, monkeypatch):
    """By the name of the file: what writes it into a folder."""
    monkeypatch.setattr(plots, "FIGURES", {"floor": lambda found: figure})
    model = build(pad_token_id=62)
    args = bench.argparse.Namespace(json=None)
    return {
        "trace.png": lambda folder: trace.write_picture(found, folder / "trace.png"),
        "trace.html": lambda folder: trace.write_page(found, folder / "trace.html"),
        "trace.json": lambda folder: trace.write_json(found, folder / "trace.json"),
        "bench.json": lambda folder: files.write_json(folder / "bench.json", {"rows": [ROW]}),
        "bench.csv": lambda folder: report.save_csv(folder / "bench.csv", [ROW]),
        "floor.png": lambda folder: plots.draw({}, folder),
        "eval.json": lambda folder: save_eval(args, folder, figure),
        "eval.png": lambda folder: save_eval(args, folder, figure),
        "gpu.json": lambda folder: Report(str(folder / "gpu.json"), {}).close(finished=True),
        "config.json": lambda folder: save_model(model, folder),
        "model.safetensors": lambda folder: save_model(model, folder),
        "tokenizer.json": lambda folder: save_tokenizer(folder, "01", 2, 3),
        "tokenizer_config.json": lambda folder: save_tokenizer(folder, "01", 2, 3),
        "checkpoint.pt": lambda folder: train_tiny.Training("tiny", 0, 1e-3).save(folder / "checkpoint.pt"),
    }  # fmt: skip


def save_eval(args, folder, figure):
    args.out = folder
    eval.save(args, {"rows": []}, "eval", lambda found: figure)


WRITTEN = (
    "trace.png", "trace.html", "trace.json", "bench.json", "bench.csv", "floor.png", "eval.json", "eval.png",
    "gpu.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "checkpoint.pt",
)  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_every_writer(tmp_path, writers, name):
    plain, linked, piped, taken = (tmp_path / kind for kind in ("plain", "linked", "piped", "taken"))
    for folder in (plain, linked, piped, taken / name):
        folder.mkdir(parents=True)
    write = writers[name]
    write(plain)
    content = (plain / name).read_bytes()
    assert content and not list(plain.glob(".*"))

    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "target").chmod(0o604)
    (linked / name).symlink_to("../target")
    write(linked)
    assert (linked / name).is_symlink() and stat.S_IMODE((tmp_path / "target").stat().st_mode) == 0o604
    assert len((tmp_path / "target").read_bytes()) == len(content)

    os.mkfifo(piped / name)
    read = []
    reader = threading.Thread(target=lambda: read.append((piped / name).read_bytes()))
    reader.start()
    write(piped)
    reader.join(20)
    assert len(read[0]) == len(content) and stat.S_ISFIFO((piped / name).lstat().st_mode)

    before = sorted(path.name for path in taken.iterdir())
    with pytest.raises(IsADirectoryError) as error:
        write(taken)
    assert error.value.filename == str(taken / name) and set(before) == {name}
    assert not list(taken.glob(".*")) and not list((taken / name).iterdir())


def test_the_writers_are_all_there_are(writers):
    assert list(writers) == list(WRITTEN)


def options(folder: Path) -> dict[str, list[str]]:
    """A command for every option that names what is written, up to the name."""
    tiny = ["--max-new-tokens", "2", "1="]
    return {
        "trace --json": ["trace", *tiny, "--out", str(folder / "o"), "--json"],
        "bench --json": ["bench", "--json"],
        "bench --csv": ["bench", "--csv"],
        "eval --json": ["eval", "--json"],
        "suggest --json": ["suggest", "--json"],
    }


@pytest.mark.parametrize("option", options(Path()))
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.mkdir(), "Is a directory"), (lambda path: path.symlink_to(path.name), "Too many levels of"),
        (lambda path: path.symlink_to("."), "Is a directory"),
        (lambda path: path.symlink_to("/proc/version"), "Permission denied|No such file|Operation not permitted"),
    ],
    ids=["folder", "ring", "link to a folder", "proc"],
)  # fmt: skip
def test_an_option_is_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch, option, make, reason):
    monkeypatch.setattr(dkv.models.loader, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    make(tmp_path / "a")
    assert main([*options(tmp_path)[option], str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err
    command, name = option.split()
    assert said.startswith(f"dkv {command}: error: {name}: cannot write {tmp_path / 'a'} (") and said.count("\n") == 1
    assert any(part in said for part in reason.split("|"))


@pytest.mark.parametrize("name", ["eval.json", "eval.png", "runs.jsonl"])
def test_what_stands_in_the_way_of_eval_is_seen_at_first(tmp_path, capsys, name):
    (tmp_path / name).mkdir()
    assert main(["eval", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"dkv eval: error: --out: cannot write {tmp_path / name} (Is a directory): give another place\n"
    )


def test_a_log_is_no_fifo(tmp_path, capsys):
    """It is read again, which would wait for ever."""
    os.mkfifo(tmp_path / quality.LOG)
    assert main(["eval", "--out", str(tmp_path)]) == 2
    assert "(Not a regular file)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["speed.png", "floor.png"])
def test_what_stands_in_the_way_of_a_figure_is_seen_at_first(tmp_path, capsys, name):
    (tmp_path / name).mkdir()
    assert main(["bench", "--plots", str(tmp_path)]) == 2
    assert f"--plots: cannot write {tmp_path / name} (Is a directory)" in capsys.readouterr().err


def test_the_other_programs_refuse_alike(tmp_path, capsys):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--device", "cpu", "--json", str(tmp_path)])
    assert f"--json: cannot write {tmp_path} (Is a directory)" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"--out: cannot write .*config.json .Is a directory.") as error:
        train_tiny.main(["tiny", "--out", str(tmp_path)])
    assert not isinstance(error.value, OSError) and sorted(os.listdir(tmp_path)) == ["config.json"]


def test_one_place_for_two_files(tmp_path, capsys):
    both = str(tmp_path / "a")
    assert main(["bench", "--json", both, "--csv", both]) == 2
    assert f"--csv: {both} is that of --json, too: give another place" in capsys.readouterr().err
    (tmp_path / "p.jsonl").write_text('{"prompt": "1=", "answer": "1"}\n')
    words = ["eval", "--data", str(tmp_path / "p.jsonl"), "--new-tokens", "2", "--json", str(tmp_path / "p.jsonl")]
    assert main(words) == 2 and "is that of --data, too" in capsys.readouterr().err
    words = ["trace", "--file", str(tmp_path / "p.jsonl"), "--json", str(tmp_path / "p.jsonl"), "--out", str(tmp_path)]
    assert main(words) == 2 and "is that of --file, too" in capsys.readouterr().err
    assert main(["trace", "1=", "--out", both, "--json", f"{both}/trace.html"]) == 2
    assert "is that of --out, too" in capsys.readouterr().err


def test_standard_output_is_json_alone(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(bench, "measured", lambda kind, options, batches: iter([{"rows": [ROW]}, {"rows": [ROW] * 2}]))
    small = ["--shape", "d128x4", "--layers", "1", "--no-eager"]
    assert main(["bench", *small, "--json", "-"]) == 0
    out, err = capfd.readouterr()
    # Written once, when all is done: a pipe cannot be written anew.
    assert len(json.loads(out)["comparison"]["rows"]) == 2 and "d128x4, 1 layer (" in err
    assert main(["trace", "--max-new-tokens", "2", "1=", "--out", str(tmp_path), "--json", "/dev/stdout"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["slots"] and "trace.png" in err
    assert gpu.main(["--device", "cpu", "--only", "nothing", "--json", "-", "checks"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["finished"] is True and "REHEARSAL" in err


def test_a_stopped_comparison_has_the_batches_that_are_done(tmp_path, monkeypatch, capsys):
    def stopped(kind, options, batches):
        yield {"rows": [ROW]}
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measured", stopped)
    small = ["--shape", "d128x4", "--layers", "1", "--no-eager"]
    path, table = tmp_path / "a.json", tmp_path / "a.csv"
    assert main(["bench", *small, "--json", str(path), "--csv", str(table)]) == 130
    said = f"dkv bench: interrupted; finished measurements are kept in {path} and {table}\n"
    assert capsys.readouterr().err.endswith(said)
    assert json.loads(path.read_text())["comparison"]["rows"] == [ROW] and table.read_text().count("\n") == 2
    assert main(["bench", "--all", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith(f"finished measurements are kept in {tmp_path / 'comparison.json'}\n")
    assert main(["bench", *small]) == 130 and capsys.readouterr().err.endswith("dkv bench: interrupted\n")
