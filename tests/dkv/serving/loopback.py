"""A server on the loopback, in this process."""

import socket
import threading
import time
from contextlib import contextmanager

import dkv
from dkv.serving.llm import LLM
from dkv.serving.protocol import Served
from dkv.tools.text import end_ids

# Sums of single digits are nothing that `tiny` knows: what counts is that all get the same.
PROMPTS = [f"{a}+{b}=" for a in range(4) for b in range(4)]


def served(model, tokenizer, **settings) -> Served:
    config = dkv.DiffusionConfig(**{"max_new_tokens": 16, "eos_token_id": end_ids(tokenizer, model.spec), **settings})
    return Served("tiny", tokenizer, model.spec, config, 64, max_choices=4, max_body=4096)


@contextmanager
def serving(model, tokenizer, rows=4, drain_seconds=60, **options):
    """(address, worker) of a server with so many rows of 64 slots."""
    from dkv.serving.listen import server_of
    from dkv.serving.server import make_app

    llm = LLM(model, max_slots=64 * rows, max_length=64)
    app = make_app(llm, served(model, tokenizer), **options)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = server_of(app, drain_seconds)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", app.state.server.worker
        finally:
            server.should_exit = True
            thread.join()


def until(true, seconds=30):
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)


def alone(model, tokenizer, prompt, **settings) -> str:
    """The text that `dkv.generate` gives."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    config = served(model, tokenizer, **settings).config
    new = dkv.generate(model, ids, generation_config=config).sequences[0, ids.shape[1] :].tolist()
    ends = [n for n, token in enumerate(new) if token in config.eos_token_id]
    return tokenizer.decode(new[: min(ends, default=len(new))], skip_special_tokens=True)
