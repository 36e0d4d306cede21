"""The command line as a whole: help, version, and how a command stops."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dkv
from dkv.cli import audit, build_parser, demo, generate, info, main, verify
from dkv.engine.settings import DEFAULTS
from dkv.policies import POLICIES

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "name", ["generate", "infill", "run", "trace", "verify", "info", "demo", "bench", "eval", "suggest", "audit"]
)
def test_every_command_explains_itself_with_an_example(capsys, name):
    assert main([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"usage: dkv {name}" in out and f"\nexamples:\n  dkv {name}" in out


def test_the_examples_parse():
    for command in (generate, verify, info, demo, audit):
        for line in command.EXAMPLES.splitlines():
            if line.startswith("  dkv "):
                words = shlex.split(line.partition("      ")[0].partition("<")[0].partition(">")[0])
                assert build_parser().parse_args(words[1:]).run is command.run


def test_defaults_are_those_of_the_settings():
    args = build_parser().parse_args(["generate"])
    settings = vars(args).keys() & DEFAULTS.keys() - {"cache"}
    assert len(settings) == 27 and {n: getattr(args, n) for n in settings} == {n: DEFAULTS[n] for n in settings}


def test_help_names_every_policy(capsys):
    main(["generate", "--help"])
    *others, last = POLICIES
    assert f"{', '.join(others)} or {last} (default: none)" in " ".join(capsys.readouterr().out.split())


def test_help_is_quick_and_the_module_runs():
    code = "import sys; from dkv.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    for command in (["-c", code], ["-m", "dkv", "--help"]):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "") and "dkv demo" in done.stdout


def test_version_and_no_command(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dkv {dkv.__version__}\n"
    assert main([]) == 2
    assert capsys.readouterr().err == "dkv: error: the following arguments are required: COMMAND (see dkv --help)\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "dkv info: interrupted\n"),
        (KeyboardInterrupt("x is kept"), 130, "dkv info: interrupted; x is kept\n"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 2, "dkv info: error: CUDA out of memory. Tried\n"),
        (PermissionError(13, "Permission denied", "x"), 2, "dkv info: error: x: Permission denied\n"),
        (ValueError(), 2, "dkv info: error: ValueError\n"),
    ],
    ids=repr,
)
def test_how_a_command_stops(capsys, monkeypatch, error, code, message):
    def stop(args):
        raise error

    monkeypatch.setattr(info, "run", stop)
    assert main(["info"]) == code
    assert capsys.readouterr() == ("", message)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(info, "run", lambda args: {}["ours"])
    with pytest.raises(KeyError):
        main(["info"])


def test_nobody_reads_the_output(monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert main(["info"]) == 141
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--max-new-tokens 10000000", "max_new_tokens (10000000) need"),
        ("--model tiny-dream --steps 100000000", "steps must be at most 65536"),
        ("--cache decode --refresh 1000000000000000000000000000000", "refresh must be at most"),
        ("--temperature nan", "temperature must be between"),
        ("--cfg-scale inf", "cfg_scale must be between"),
        ("--seed 1000000000000000000000000000000", "seed must be at most"),
        ("--confidence random --confidence-eos-eot-inf", "confidence_eos_eot_inf needs a confidence"),
    ],
)
def test_absurd_options_are_refused_at_once(capsys, options, message):
    assert main(["generate", *options.split(), "1+2="]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_the_end_token_can_be_kept_out(capsys):
    found, prompt = {}, "+1 +2 -3 +1 -2 +3 +3 -1 -2 +1 +2 -3 -1 +2 +2 -1 +3 -2 -3 +1 +2="
    for option in ("--raw", "--logits-eos-inf", "--confidence-eos-eot-inf"):
        assert main(["generate", "--max-new-tokens", "68", "--json", option, prompt]) == 0
        found[option] = json.loads(capsys.readouterr().out)["tokens"]
    eos = dkv.load("tiny").spec.eos_token_id
    assert eos in found["--raw"] and eos not in found["--logits-eos-inf"]
    assert found["--confidence-eos-eot-inf"][:63] == found["--raw"][:63]


def test_arguments_that_no_shell_can_give(capsys):
    assert main(["generate", "1=\0"]) == main(["info", "--model\0"]) == 2
    assert capsys.readouterr().err.count("error: an argument holds a NUL character") == 2


@pytest.mark.parametrize("device", ["meta", "mps", "hpu", "cpu:-1", "cuda:99", ""])
@pytest.mark.parametrize("words", [["generate", "1="], ["trace", "1="], ["bench"], ["bench", "--shape", "d128x4"]])
def test_a_device_that_holds_no_numbers(capsys, tmp_path, monkeypatch, words, device):
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--device", device]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    why = "holds no weights" if device == "meta" else "cannot be used here ("
    assert f"device={device!r} {why}" in line and len(line) < 250
