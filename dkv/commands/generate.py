"""`dkv generate`: continue a prompt, or a file of them."""

import argparse
import json
import secrets
import sys
from pathlib import Path
from typing import Any, TextIO

SUMMARY = "Continue a prompt with a diffusion language model."

EXAMPLES = """\
examples:
  dkv generate --max-new-tokens 64 '+1 +2 -3 +1 -2 +3 +3 -1 -2 +1 +2 -3 -1 +2 +2 -1 +3 -2 -3 +1 +2='
  dkv generate --model GSAI-ML/LLaDA-8B-Instruct --chat --cache decode --refresh 8 'Why is the sky blue?'
  dkv generate --model GSAI-ML/LLaDA-8B-Base --cache greedy --refresh 2 --window 4 --stats --file prompt.txt
  dkv generate --cache dual --block-length 16 --threshold 0.9 --max-new-tokens 64 --stats '+1 +2 -3 +1 -2 +3 +3 -1='
  dkv generate --lines --json < prompts.txt > answers.json

In a terminal the drafts are shown as they fill: masks as a shade, new tokens bold. Elsewhere only
the final text is written. What follows its end is not computed, unless --raw asks for it. Write a
prompt that begins with a dash after `--`.
"""

# Options that go into the policy, by their names there.
POLICY_OPTIONS = ("refresh", "window", "warmup", "shift_rule", "delayed")
# Options that go into `dkv.DiffusionConfig` as they are; the others have its defaults.
SETTINGS = (
    "max_new_tokens", "steps", "block_length", "schedule", "confidence", "confidence_dtype", "temperature", "top_p",
    "top_k", "threshold", "factor", "cfg_scale", "logits_eos_inf", "confidence_eos_eot_inf",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generation(parser, "every line that is not blank is a prompt; they make one batch")
    add = parser.add_argument_group("output").add_argument
    add("--raw", action="store_true", help="do not cut the text at its end, and write special tokens out")
    add("--stats", action="store_true", help="tokens, time, passes, computed share and seed on standard error")
    add("--json", action="store_true", help="an object with text, tokens and stats (with --lines: lists of them)")
    add("--no-stream", action="store_true", help="do not show drafts in a terminal")


def add_generation(parser: argparse.ArgumentParser, lines: str) -> None:
    """The options of a command that generates: prompt, model, decoding and cache; `lines` is the help of --lines."""
    add = parser.add_argument_group("prompt").add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="text to continue; - or none at all reads standard input")
    add("--file", type=Path, metavar="FILE", help="take the whole text of FILE as the prompt")
    add("--lines", action="store_true", help=lines)
    add("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")

    add = parser.add_argument_group("model").add_argument
    add("--model", default="tiny", help="tiny, tiny-dream, a checkpoint folder or a hub id (default: %(default)s)")
    add("--dtype", help="auto, float32, bfloat16, float16 or float64 (default: auto, on a CPU at least float32)")
    add("--device", help="such as cpu or cuda:1 (default: the current GPU, or else cpu)")

    _add_decoding(parser)
    _add_cache(parser)


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("decoding").add_argument
    add("--max-new-tokens", type=int, default=128, metavar="N", help="slots to fill (default: %(default)s)")
    add("--steps", type=int, metavar="N", help="passes in all (default: one per slot)")
    add("--block-length", type=int, metavar="N", help="fill blocks of N slots one by one (default: one block)")
    add("--schedule", help="blocks (LLaDA) or time (Dream) (default: that of the model)")
    rules = "probability, margin, entropy or random"
    add("--confidence", default="probability", help=f"what is decoded first: {rules} (default: %(default)s)")
    published = "exact, or model: rounded to the model's dtype, as in Dream's published code"
    add("--confidence-dtype", default="exact", metavar="KIND", help=f"{published} (default: %(default)s)")
    add(
        "--threshold",
        type=float,
        metavar="P",
        help="fill all slots that are at least so sure; --steps is then a limit",
    )
    add(
        "--factor",
        type=float,
        metavar="F",
        help="fill the n surest slots, n as large as (n+1)(1-confidence)<F allows",
    )
    add("--cfg-scale", type=float, default=0.0, metavar="S", help="guidance by the prompt (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="above 0 tokens are drawn (default: %(default)s)")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that make up P (default: all)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default: all)")
    add("--logits-eos-inf", action="store_true", help="never emit the token that ends a text")
    add("--confidence-eos-eot-inf", action="store_true", help="fill slots with a token that ends a text or a turn last")
    add("--seed", type=int, metavar="N", help="of the random numbers, in every row (default: new ones; see --stats)")


def _add_cache(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "cache", "The policy and its options; each goes with the policies in brackets, see also dkv info."
    ).add_argument
    names = "none, decode, greedy, prefill, pd, prefix or dual"
    add("--cache", default="none", metavar="POLICY", help=f"{names} (default: %(default)s)")
    own = "default: the policy's own"
    add("--refresh", type=int, metavar="N", help=f"full pass every N steps, 0: never [decode, greedy, pd] ({own})")
    add("--window", type=int, metavar="N", help=f"masked neighbours computed per slot [greedy] ({own})")
    add("--warmup", type=int, metavar="N", help=f"full passes at the start of a block [decode, pd] ({own})")
    add("--delayed", action="store_true", default=None, help="skip decoded slots of the block, too [prefix, dual]")
    add("--shift-rule", metavar="RULE", help=f"un, un_right or right: when Dream caches a slot [decode, pd] ({own})")


def run(args: argparse.Namespace) -> int:
    prompts = read_prompts(args)
    import dkv
    from dkv.streaming import DraftStreamer, ProgressStreamer, draws_drafts
    from dkv.text import answer, end_ids

    config, model, tokenizer, ids, mask = prepare(args, prompts)
    if not args.raw:
        # What follows the end of a text is not shown.
        config.update(eos_token_id=end_ids(tokenizer, model.spec))
    stream = draws_drafts() and not (args.json or args.no_stream)
    # Every draft costs a copy from the device: none where nobody sees it.
    streamer = None
    if stream:
        streamer = DraftStreamer(tokenizer, model.spec, args.raw)
    elif sys.stderr.isatty():
        streamer = ProgressStreamer(len(config.plan(model.spec.shifted)))
    try:
        output = dkv.generate(model, ids, mask, generation_config=config, streamer=streamer)
    finally:
        if streamer is not None:
            streamer.end()
    rows = output.sequences[:, ids.shape[1] :].tolist()
    texts = [answer(tokenizer, model.spec, row, args.raw) for row in rows]
    if args.json:
        text, tokens = (texts, rows) if args.lines else (texts[0], rows[0])
        print(json.dumps({"text": text, "tokens": tokens, "stats": output.stats.to_dict()}))
    elif not stream:
        print(*texts, sep="\n")
    if args.stats:
        print(summary(output.stats), file=sys.stderr)
    return 0


def prepare(args: argparse.Namespace, prompts: list[str]) -> tuple[Any, Any, Any, Any, Any]:
    """What the arguments of `add_generation` ask for: settings, model, tokenizer, and ids [B, P] with their mask."""
    import dkv
    from dkv.inputs import checked_inputs
    from dkv.text import encode, turn_end_ids

    config = dkv.DiffusionConfig(**settings(args))
    model = dkv.load(args.model, dtype=args.dtype, device=args.device)
    tokenizer = dkv.load_tokenizer(args.model)
    config.update(eot_token_id=turn_end_ids(tokenizer))
    if config.seed is None:
        config.update(seed=[secrets.randbits(62) for _ in prompts] if len(prompts) > 1 else secrets.randbits(62))
    ids, mask = (t.to(model.device) for t in encode(tokenizer, prompts, args.chat))
    checked_inputs(model, ids, mask, config)
    return config, model, tokenizer, ids, mask


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that the arguments name; the newline that ends a file is not part of one.

    Raises:
        ValueError: there is none, or two, or the input is not text.
        OSError: the file cannot be read.
    """
    text, source = args.prompt, None
    if args.file is not None:
        if text is not None:
            raise ValueError("give a prompt or --file, not both")
        with args.file.open(encoding="utf-8") as stream:
            text, source = _read(stream, args.file), args.file
    elif text in (None, "-"):
        if text is None and sys.stdin.isatty():
            raise ValueError("no prompt: give one, or --file FILE, or pipe it in")
        text, source = _read(sys.stdin, "standard input"), "standard input"
    try:
        # Bytes that are not text in the system's encoding, which may be ASCII, arrive as halves of surrogate pairs.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{source or 'PROMPT'} is not text in UTF-8") from error
    prompts = [line for line in text.split("\n") if line.strip()] if args.lines else [text]
    # An empty prompt is allowed where it was meant.
    if not any(prompts) and (args.lines or source):
        raise ValueError(f"no prompt: {source or 'PROMPT'} is empty")
    return prompts


def _read(stream: TextIO, source: object) -> str:
    try:
        return stream.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not text in {error.encoding}") from error


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of `dkv.DiffusionConfig` that the arguments ask for."""
    policy = {name: value for name in POLICY_OPTIONS if (value := getattr(args, name)) is not None}
    chosen = {name: getattr(args, name) for name in SETTINGS}
    return {**chosen, "seed": args.seed, "cache": {"name": args.cache, **policy}}


def summary(stats: Any) -> str:
    """What a generation cost, in one line."""
    from dkv.bar import counted

    tokens, passes = counted(stats.new_tokens, "token"), counted(stats.passes, "pass")
    return (
        f"{tokens} in {stats.seconds:.2f} s ({stats.tokens_per_second:.1f} tokens/s), "
        f"{passes} ({stats.full_passes} full), {stats.computed_share:.0%} of the slots computed, "
        f"seed {stats.seed}, {stats.settings['dtype'].removeprefix('torch.')} on {stats.settings['device']}"
    )
