"""The same requests over HTTP: `dkv serve` in a process of its own, and clients that ask on the loopback."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from dkv.bench.speed.arrivals import Answered, Ask, Served

# Seconds that a server may take to load its model, or a client waits for an answer.
PATIENCE = 300


@contextmanager
def running(name: str, served: Served, waiting: int) -> Iterator[str]:
    """The address of a server for a bundled model or a checkpoint; it ends with the block.

    Raises:
        RuntimeError: it does not start, and says why on standard error.
    """
    limits = {"port": 0, "max-length": served.slots, "max-slots": served.rows * served.slots, "max-waiting": waiting}
    flags = [word for option, value in limits.items() for word in (f"--{option}", str(value))]
    command = [sys.executable, "-m", "dkv", "serve", name, "--device", str(served.model.device), *flags]
    # It finds the packages where this process has found them, and has as many threads.
    paths, threads = os.pathsep.join(filter(None, sys.path)), str(torch.get_num_threads())
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": threads}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as server:
        said = ""
        try:
            for line in server.stderr:
                said += line
                if " at http://" in line:
                    yield line.split(" at ")[1].split(",")[0]
                    break
            else:
                raise RuntimeError(f"dkv serve did not start: {said}")
        finally:
            server.terminate()


def over_http(name: str, tokenizer: Any, served: Served, asks: Sequence[Ask]) -> list[Answered]:
    """Ask a server, a client for each request, at the times of their arrival; answers are streamed.

    Raises:
        RuntimeError: an answer is not the text of the tokens that `dkv.generate` gives.
    """
    import httpx

    cache, ends = served.settings["cache"], served.settings["eos_token_id"] or []
    # The ends are those of the server, too.
    settings = {name: value for name, value in served.settings.items() if name != "eos_token_id"}
    settings["cache"] = {"name": cache.name, **asdict(cache)}

    async def ask_all(url: str) -> list[tuple[str, float, float]]:
        most = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=most) as client:
            await _asked(client, _body(name, Ask(0, [0], 2), settings), 0)
            begin = time.perf_counter()
            calls = (_asked(client, _body(name, ask, settings), begin + ask.at) for ask in asks)
            return await asyncio.gather(*calls)

    with running(name, served, len(asks)) as url:
        heard = asyncio.run(ask_all(url))
    found = []
    for ask, (text, first, whole) in zip(asks, heard, strict=True):
        (tokens,) = served.at_once([ask])
        shown = tokens[: min((n for n, token in enumerate(tokens) if token in ends), default=len(tokens))]
        expected = tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text != expected:
            raise RuntimeError(f"request {ask.number} was answered {text!r} by the server, and {expected!r} alone")
        found.append(Answered(ask, tokens, first, whole))
    return found


def _body(name: str, ask: Ask, settings: dict[str, Any]) -> dict[str, Any]:
    return {"model": name, "prompt": ask.prompt, "max_tokens": ask.new, "seed": ask.number, "stream": True, **settings}


async def _asked(client: Any, body: dict[str, Any], at: float) -> tuple[str, float, float]:
    """The text of an answer that is asked for at a time, and the seconds to its first piece and to its end."""
    await asyncio.sleep(max(at - time.perf_counter(), 0))
    text, first = "", None
    async with client.stream("POST", "/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"the server refused a request: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(f"a request failed: {event['error']['message']}")
                text += event["choices"][0]["text"]
                if text and first is None:
                    first = time.perf_counter() - at
    whole = time.perf_counter() - at
    return text, whole if first is None else first, whole
