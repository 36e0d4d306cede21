"""`dkv serve` as a process, and what it says where it cannot start."""

import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import dkv
from dkv.cli import main
from tests.dkv.serving.loopback import PROMPTS, alone, until

ROOT = Path(__file__).parents[3]


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    # What needs it may have been imported by another test.
    monkeypatch.delitem(sys.modules, "dkv.serving.listen", raising=False)
    assert main(["serve", "tiny"]) == 2
    assert capsys.readouterr().err == "dkv serve: error: uvicorn is not installed: pip install 'dkv[serve]'\n"


def test_what_it_cannot_use_is_told_before_a_model_is_loaded(monkeypatch, capsys):
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for said, *options in (
            (f"127.0.0.1:{port}: Address already in use", "--port", port),
            ("--port must be from 0 to 65535, got 65536", "--port", 65536),
            ("the API key must be printable ASCII, and not empty", "--api-key", ""),
            ("max_waiting must be", "--max-waiting", -1),
        ):
            assert main(["serve", "nowhere", *map(str, options)]) == 2
            assert said in capsys.readouterr().err


def server_of(*options) -> subprocess.Popen:
    command = [sys.executable, "-m", "dkv", "serve", "tiny", "--port", "0", *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)


def address(server) -> str:
    return server.stderr.readline().split(" at ")[1].split(",")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "code"), [([signal.SIGTERM], -signal.SIGTERM), ([signal.SIGINT], 130), ([signal.SIGINT] * 2, 130)]
)
def test_a_signal_lets_what_was_asked_be_answered_and_a_second_interrupt_does_not(signals, code):
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    with server_of("--max-length", "512", "--max-slots", "512") as server:
        url = address(server)
        body = {"model": "tiny", "prompt": "1+2=", "max_tokens": 250, "stream": True}
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=120) as response:
            # Its head is there: it has been taken.
            server.send_signal(signals[0])
            for number in signals[1:]:
                threading.Timer(0.3, server.send_signal, [number]).start()
            try:
                text = "".join(response.iter_text())
            except httpx.HTTPError:
                text = ""
        assert text.endswith("data: [DONE]\n\n") is (len(signals) == 1)
        assert server.wait(30) == code
        assert "Traceback" not in server.stderr.read()


@pytest.mark.slow
def test_nothing_that_was_asked_is_lost_when_a_server_under_load_is_stopped():
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    prompts = PROMPTS * 3
    with server_of("--max-length", "64", "--max-slots", "256") as server, ThreadPoolExecutor(len(prompts)) as clients:
        url = address(server)

        def health(url):
            return httpx.get(url.replace("/v1", "/health")).json()

        def ask(prompt):
            # Without a limit all take turns and end together, long after the signal.
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 48, "cache": "decode"}
            return httpx.post(f"{url}/completions", json=body, timeout=120)

        asked = [clients.submit(ask, prompt) for prompt in prompts]
        until(lambda: health(url)["open"] == len(prompts) or any(one.done() for one in asked))
        assert health(url)["open"] > 1
        server.send_signal(signal.SIGTERM)
        responses = [one.result() for one in asked]
        assert server.wait(60) == -signal.SIGTERM
        with pytest.raises(httpx.ConnectError):
            ask("1+2=")
    model, tokenizer = dkv.load("tiny", device="cpu"), dkv.load_tokenizer("tiny")
    own = {"max_new_tokens": 48, "cache": dkv.DecodeCache()}
    want = {prompt: alone(model, tokenizer, prompt, **own) for prompt in PROMPTS}
    for prompt, response in zip(prompts, responses, strict=True):
        assert response.status_code == 200 and response.json()["choices"][0]["text"] == want[prompt]
