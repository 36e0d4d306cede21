"""`dkv generate`: where the prompt comes from, what is printed, and errors in one line."""

import fcntl
import io
import json
import os
import pty
import shutil
import struct
import termios
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dkv.cli import main

ROOT, EOS = Path(__file__).parents[3], 14


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ((), {}),
        (
            ("--steps", 4, "--block-length", 6, "--confidence", "margin"),
            {"steps": 4, "block_length": 6, "confidence": "margin"},
        ),
        (
            ("--cache", "decode", "--refresh", 3, "--warmup", 1),
            {"cache": {"name": "decode", "refresh": 3, "warmup": 1}},
        ),
        (("--cache", "greedy", "--window", 2), {"cache": {"name": "greedy", "window": 2}}),
        (("--cache", "pd"), {"cache": "pd"}),
        (
            ("--temperature", 1, "--top-p", 0.9, "--top-k", 5, "--seed", 7),
            {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "seed": 7},
        ),
        (("--schedule", "time", "--dtype", "float64"), {"schedule": "time"}),
        (("--threshold", 0.05, "--block-length", 4), {"threshold": 0.05, "block_length": 4}),
        (("--threshold", 0.3, "--threshold-decay", 0.5), {"threshold": 0.3, "threshold_decay": 0.5}),
        (
            ("--cache", "suffix", "--window", 3, "--tail", 2, "--base", "dual", "--block-length", 4),
            {"cache": {"name": "suffix", "window": 3, "tail": 2, "base": "dual"}, "block_length": 4},
        ),
        (("--factor", 1.9, "--cfg-scale", 0.5), {"factor": 1.9, "cfg_scale": 0.5}),
        (("--entropy-bound", 3, "--entropy-form", "code"), {"entropy_bound": 3, "entropy_form": "code"}),
        (
            ("--threshold", 0.2, "--near-threshold", 0.05, "--radius", 2),
            {"threshold": 0.2, "near_threshold": 0.05, "radius": 2},
        ),
        (
            ("--schedule", "sliding", "--block-length", 4, "--most", 5, "--cache", "sliding", "--prefix-window", 2),
            {"schedule": "sliding", "block_length": 4, "most": 5, "cache": {"name": "sliding", "prefix_window": 2}},
        ),
        (
            ("--cache", "dual", "--delayed", "--block-length", 4),
            {"cache": {"name": "dual", "delayed": True}, "block_length": 4},
        ),
    ],
    ids=str,
)
def test_generate_prints_the_text(run, expected, options, settings):
    assert run("generate", "+7 -3=", "--max-new-tokens", 12, *options) == (0, expected("+7 -3=", **settings) + "\n", "")


@pytest.mark.parametrize("prompt", [(), ("-",)])
def test_generate_reads_standard_input(run, expected, monkeypatch, prompt):
    monkeypatch.setattr("sys.stdin", io.StringIO("+7 -3=\n"))
    assert run("generate", *prompt, "--max-new-tokens", 12) == (0, expected("+7 -3=") + "\n", "")


def test_generate_reads_a_file(run, expected, tmp_path):
    (tmp_path / "prompt").write_text("+7 -3=\n")
    assert run("generate", "--file", tmp_path / "prompt", "--max-new-tokens", 12)[1] == expected("+7 -3=") + "\n"


def test_B08_lines_are_decoded_together_as_each_alone(run, expected, tmp_path):
    (tmp_path / "prompts").write_text("+7 -3=\n\n1=\n+1 +1 +1=")
    code, out, _ = run("generate", "--file", tmp_path / "prompts", "--lines", "--max-new-tokens", 12, "--json")
    assert code == 0
    assert json.loads(out)["text"] == [expected(prompt) for prompt in ("+7 -3=", "1=", "+1 +1 +1=")]
    assert [len(tokens) for tokens in json.loads(out)["tokens"]] == [12] * 3


def test_what_follows_the_end_of_a_text_is_not_computed_unless_it_is_shown(run):
    """The bundled model ends its answers with many end tokens."""
    call = ("generate", "--model", "tiny", "--max-new-tokens", 80, "--block-length", 10, "--json")
    prompt = "+1 +2 -3 +1 -2 +3 +3 -1 -2 +1 +2 -3 -1 +2 +2 -1 +3 -2 -3 +1 +2="
    short, whole = (json.loads(run(*call, *more, prompt)[1]) for more in ((), ("--raw",)))
    assert short["stats"]["new_tokens"] == len(short["text"]) + 1 < whole["stats"]["new_tokens"] == 80
    assert short["stats"]["passes"] < whole["stats"]["passes"] == 80
    assert whole["text"].startswith(short["text"])


def test_equal_lines_are_drawn_apart_unless_there_is_a_seed(run, tmp_path):
    (tmp_path / "prompts").write_text("1=\n" * 4)
    call = ("generate", "--lines", "--file", tmp_path / "prompts", "--max-new-tokens", 12, "--temperature", 2, "--json")
    assert len({tuple(row) for row in json.loads(run(*call)[1])["tokens"]}) > 1
    assert len({tuple(row) for row in json.loads(run(*call, "--seed", 3)[1])["tokens"]}) == 1


def test_generate_json(run, expected):
    code, out, err = run("generate", "+7 -3=", "--max-new-tokens", 12, "--cache", "decode", "--seed", 3, "--json")
    found = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert found.keys() == {"text", "tokens", "stats"} and len(found["tokens"]) == 12
    assert found["text"] == expected("+7 -3=", cache="decode")
    assert found["stats"]["seed"] == 3 and found["stats"]["settings"]["cache"]["name"] == "decode"


def test_generate_stats(run):
    code, out, err = run("generate", "1=", "--max-new-tokens", 12, "--cache", "decode", "--seed", 3, "--stats")
    assert code == 0 and out.count("\n") == err.count("\n") == 1
    assert err.startswith("12 tokens in ") and "12 passes (3 full), " in err and "seed 3, float32 on cpu" in err


def test_generate_draws_a_new_seed_each_time(run):
    seeds = {json.loads(run("generate", "1=", "--max-new-tokens", 1, "--json")[1])["stats"]["seed"] for _ in range(2)}
    assert len(seeds) == 2


def test_generate_raw_does_not_stop_at_the_end(run, monkeypatch):
    sequences = torch.tensor([[1, 12, 3, EOS, 4]])
    output = SimpleNamespace(sequences=sequences, stats=None)
    monkeypatch.setattr("dkv.generate", lambda *args, **kwargs: output, raising=False)
    assert run("generate", "1=")[1] == "3\n"
    assert run("generate", "1=", "--raw")[1] == "3<|endoftext|>4\n"


def test_generate_chat(run, expected, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("{{ messages[0].content }}=")
    args = ("--model", tmp_path / "chat", "--chat", "--max-new-tokens", 12)
    assert run("generate", "+7 -3", *args)[1] == expected("+7 -3=") + "\n"


def test_B22_generate_never_emits_ids_without_text(run, write_model, tmp_path):
    wide = write_model(tmp_path / "wide", vocab_size=200)
    found = json.loads(run("generate", "1=", "--model", wide, "--max-new-tokens", 12, "--json")[1])
    assert max(found["tokens"]) < 16 and found["stats"]["settings"]["vocab_limit"] == 16


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("1=", "--cache", "decode", "--window", 2), "policy 'decode' has no window; it takes "),
        (("1=", "--cache", "lru"), "unknown policy 'lru'; known are none, decode, greedy, prefill, pd"),
        (("1=", "--refresh", "often"), "argument --refresh: invalid int value: 'often'"),
        (("1=", "--steps", 0), "steps must be a whole number of at least 1, got 0"),
        (("1=", "--confidence", "high"), "confidence must be one of probability, margin"),
        (("1=", "--max-new-tokens", 300), "need 302 positions, the model has 256"),
        (("1=", "--dtype", "int8"), "dtype='int8' is not supported"),
        (("1=", "--weights", "int44"), "weights='int44' is not known: did you mean 'int4'?"),
        (("1=", "--weights", "int4", "--device", "cpu"), 'weights="int4" is for GPUs: on a CPU take weights="int8"'),
        (("1=", "--keep-head"), "keep_head goes with weights='int8' or 'int4'"),
        (("1=", "--device", "abacus"), "device='abacus' cannot be used here"),
        (("1=", "--model", "nowhere"), "there is no folder nowhere"),
        (("1=", "--model", ROOT / "tests/golden/llada_gqa"), "has no tokenizer: put its files"),
        (("1=", "--attention-block", 4), "attention_block=4 has no meaning: llada has no blocks of its own"),
        (("1=", "--family", "drem"), "family='drem' is not known: did you mean 'dream'?"),
        (("one=",), "no token for 'o', 'n', 'e'; it knows the characters ' +-0123456789='"),
        (("1=", "--chat"), "no chat template"),
        (("1=", "--file", "prompt"), "give a prompt or --file, not both"),
        (("--file", "nowhere"), "nowhere: No such file or directory"),
        (("--file", ROOT), ": Is a directory"),
        (("--file", ROOT / "tests/golden/llada_gqa/model.safetensors"), "is not text in utf-8"),
        (("-",), "no prompt: standard input is empty"),
        (("\n", "--lines"), "no prompt: PROMPT is empty"),
        (("-3=",), "unknown arguments: -3="),
        (("1=", "--colour"), "unknown arguments: --colour"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_of_generate_are_one_line(run, monkeypatch, args, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, out, err = run("generate", *args)
    assert (code, out) == (2, "")
    assert err.startswith("dkv generate: error: ") and err.count("\n") == 1 and message in err


def test_generate_without_a_prompt_in_a_terminal(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert run("generate")[2] == "dkv generate: error: no prompt: give one, or --file FILE, or pipe it in\n"


def test_generate_draws_drafts_in_a_terminal(expected, folder, monkeypatch):
    keyboard, screen = pty.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 9, 0, 0))
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    written = []
    # Read while it is written: a terminal holds a few thousand characters only.
    reader = threading.Thread(target=lambda: written.append(read_to(keyboard, b"done")))
    reader.start()
    with os.fdopen(screen, "w") as terminal:
        for name in ("stdout", "__stdout__"):
            monkeypatch.setattr(f"sys.{name}", terminal)
        code = main(["generate", "1=", "--model", str(folder), "--max-new-tokens", "12"])
        terminal.write("done")
        terminal.flush()
        reader.join()
    os.close(keyboard)
    first, *others, final = written[0].removesuffix("done").replace("\r\n", "\n").split("\x1b[J")
    assert code == 0 and len(others) == 11
    assert first.count("░") == 11 and "\x1b[1;32m" in first
    # Twelve slots take two lines of eight columns.
    assert all(draft.endswith("\n\x1b[2A") for draft in (first, *others[:8]))
    assert final == expected("1=") + "\n"


def read_to(terminal: int, mark: bytes) -> str:
    found = b""
    while not found.endswith(mark):
        found += os.read(terminal, 1024)
    return found.decode()
