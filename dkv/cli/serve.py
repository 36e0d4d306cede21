"""`dkv serve`: answer over HTTP, as OpenAI's interface does."""

import argparse
import os
import socket

from dkv.cli import generate
from dkv.cli.several import follow, ranks_of
from dkv.common import process

SUMMARY = "Serve a diffusion language model over HTTP, in the form of OpenAI's interface."

EXAMPLES = """\
examples:
  dkv serve tiny --cache decode --refresh 8
  dkv serve GSAI-ML/LLaDA-8B-Instruct --cache dual --block-length 32 --threshold 0.9 --max-length 4096
  DKV_API_KEY=secret dkv serve tiny --host 0.0.0.0 --port 8080

Ask it so:
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "tiny", "prompt": "#..##.#...#.##..#.#....##.#=", "max_tokens": 112}'

http://127.0.0.1:8000/ is a page that asks, and shows the draft while it is filled.

The settings given here are those of requests that do not say otherwise; requests may give any of them by its name in
dkv.generate, such as block_length, threshold, cache or refresh. Every answer is the one that dkv.generate gives alone
with the same settings, whoever else is asking. SIGTERM, or Ctrl-C, answers what was asked and then stops; a second
Ctrl-C stops at once.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("model", metavar="MODEL", help="tiny, tiny-dream, a checkpoint folder or a hub id; clients ask for this name")
    generate.add_loading(add)
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all (default: %(default)s)")
    add("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    key = "that clients have to send; better given by the variable DKV_API_KEY, as others see the arguments"
    add("--api-key", metavar="KEY", help=key)
    add = parser.add_argument_group("limits").add_argument
    rows = "slots of all rows that are worked on at a time (default: what part of the free memory holds)"
    add("--max-slots", type=int, metavar="N", help=rows)
    length = "slots of a prompt and its answer (default: 2048, or what the model has)"
    # `max_length` is a setting of a generation, too.
    add("--max-length", type=int, dest="row_length", metavar="N", help=length)
    waiting = "requests that may wait for a row; others are refused with 429 (default: %(default)s)"
    add("--max-waiting", type=int, default=64, metavar="N", help=waiting)
    add("--max-choices", type=int, default=16, metavar="N", help="answers to one request (default: %(default)s)")
    add("--max-body", type=int, default=1 << 20, metavar="BYTES", help="of one request (default: %(default)s)")
    drain = "how long clients may go on reading after SIGTERM or Ctrl-C (default: %(default)s)"
    add("--drain-seconds", type=int, default=300, metavar="N", help=drain)
    generate.add_decoding(parser, new_tokens=128)


def run(args: argparse.Namespace) -> int:
    try:
        from dkv.serving.listen import server_of
        from dkv.serving.server import make_app
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn", "prometheus_client"):
            raise
        raise ValueError(f"{error.name} is not installed: pip install 'dkv[serve]'") from None
    from dkv.core.validation import whole
    from dkv.serving.protocol import Served
    from dkv.serving.shared import llm_of
    from dkv.tools.text import end_ids

    key = os.environ.get("DKV_API_KEY") if args.api_key is None else args.api_key
    if key is not None and not (key and key.isascii() and key.isprintable()):
        raise ValueError("the API key must be printable ASCII, and not empty")
    for name, least in (("max_waiting", 0), ("max_choices", 1), ("max_body", 1), ("drain_seconds", 0)):
        whole(name, getattr(args, name), least)
    ranks = ranks_of(args.device)
    if follow(ranks, lambda: generate.load(args)[1]):
        return 0
    # Before a model is loaded: the address may be taken.
    with bound(args.host, args.port) as listening:
        config, model, tokenizer = generate.load(args)
        config.update(eos_token_id=end_ids(tokenizer, model.spec))
        llm = llm_of(model, max_slots=args.max_slots, max_length=args.row_length, generation_config=config)
        choices = min(args.max_choices, llm.rows + args.max_waiting)
        served = Served(args.model, tokenizer, model.spec, config, llm.max_length, choices, args.max_body)
        app = make_app(llm, served, max_waiting=args.max_waiting, api_key=key)
        host, port = listening.getsockname()[:2]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        process.say(f"dkv serve: {args.model} at {where}, {llm.rows} rows of {llm.max_length} slots")
        if key is None and host not in ("127.0.0.1", "::1"):
            process.say("dkv serve: anybody who reaches this address may ask: --api-key asks for a key")
        # It handles the signals, and raises them again when it is done.
        server = server_of(app, args.drain_seconds)

        def failed(error: Exception) -> None:
            # Now, as the signal that ends the others comes soon, and is raised again when the server has stopped.
            process.tell(error)
            server.should_exit = True

        llm.on_failed = failed
        server.run([listening])
    return 0 if ranks is None or app.state.server.worker.error is None else 2


def bound(host: str, port: int) -> socket.socket:
    """A socket with this address, which does not listen yet.

    Raises:
        ValueError: the port is none.
        OSError: the address is taken, or is none of this machine.
    """
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port must be from 0 to 65535, got {port}")
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from None
    return found
