"""`dkv generate`: continue a prompt, or a file of them."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dkv.cli.families import add_families, own_settings
from dkv.cli.model import add_told, add_weights, told, weights
from dkv.cli.several import draw_seeds, of_first, ranks_of

SUMMARY = "Continue a prompt with a diffusion language model."

EXAMPLES = """\
examples:
  dkv generate --max-new-tokens 64 '+1 +2 -3 +1 -2 +3 +3 -1 -2 +1 +2 -3 -1 +2 +2 -1 +3 -2 -3 +1 +2='
  dkv generate --cache dual --block-length 16 --threshold 0.99 --max-new-tokens 112 '#..##.#...#.##..#.#....##.#='
  dkv generate --lines --json --cache decode < prompts.txt > answers.json
  dkv generate --model GSAI-ML/LLaDA-8B-Instruct --chat --cache decode --refresh 8 'Why is the sky blue?'
  dkv generate --model GSAI-ML/LLaDA-8B-Base --cache greedy --refresh 2 --window 4 --stats --file prompt.txt

The bundled tiny knows three tasks: 21 deposits and withdrawals as above, after each of which it tells the balance of
an account that opens with 50; sums of two numbers of 40 digits; and rows of 27 cells under rule 30. To other prompts it
answers with nonsense, or not at all.

In a terminal the drafts are shown as they fill: masks as a shade, new tokens bold. Elsewhere only
the final text is written. What follows its end is not computed, unless --raw asks for it. Write a
prompt that begins with a dash after `--`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generation(parser, "every line that is not blank is a prompt; they make one batch")
    add_families(parser)
    raw, stats = "do not cut the text at its end, and write special tokens out", "tokens, time, passes, computed share"
    add_output(parser, raw, stats, "text, tokens")


def add_generation(parser: argparse.ArgumentParser, lines: str) -> None:
    """The options of a command that generates: prompt, model, decoding and cache; `lines` is the help of --lines."""
    add = add_source(parser, "prompt", "text to continue", lines)
    add("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    add_model(parser)
    add_decoding(parser, new_tokens=128)


def add_source(parser: argparse.ArgumentParser, name: str, text: str, lines: str) -> Any:
    """The options of where the text comes from, for `read_source`; returns the `add_argument` of their group."""
    add = parser.add_argument_group(name).add_argument
    add("prompt", nargs="?", metavar=name.upper(), help=f"{text}; - or none at all reads standard input")
    add("--file", type=Path, metavar="FILE", help=f"take the whole of FILE as the {name}")
    add("--lines", action="store_true", help=lines)
    return add


def add_loading(add: Any) -> None:
    """The options of how a model is loaded, for `load`."""
    add_weights(add)
    add("--device", help="such as cpu or cuda:1 (default: the current GPU, or else cpu)")
    add_told(add)


def add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", default="tiny", help="a bundled model, a checkpoint folder or a hub id (default: %(default)s)")
    add_loading(add)


def add_output(parser: argparse.ArgumentParser, raw: str, stats: str, facts: str) -> None:
    """The options of what is written, for `write`; their helps say what is raw, and what the others tell."""
    add = parser.add_argument_group("output").add_argument
    add("--raw", action="store_true", help=raw)
    add("--stats", action="store_true", help=f"{stats} and seed on standard error")
    add("--json", action="store_true", help=f"an object with {facts} and stats (with --lines: lists of them)")
    add("--no-stream", action="store_true", help="do not show drafts in a terminal")


def add_decoding(parser: argparse.ArgumentParser, new_tokens: int | None = None) -> None:
    """The options of steps, rules, random numbers and cache; of the number of slots, if it has this default."""
    add = parser.add_argument_group("decoding").add_argument
    if new_tokens is not None:
        add("--max-new-tokens", type=int, default=new_tokens, metavar="N", help="slots to fill (default: %(default)s)")
    add("--steps", type=int, metavar="N", help="passes in all (default: one per slot)")
    add("--block-length", type=int, metavar="N", help="fill blocks of N slots one by one (default: one block)")
    add("--schedule", help="blocks (LLaDA), time (Dream), sliding or speculative (default: the model's)")
    add("--most", type=int, metavar="N", help="slots of the region that slides (default: to the end of the row)")
    rules = "probability, margin, entropy, random or sequential"
    add("--confidence", default="probability", help=f"what is decoded first: {rules} (default: %(default)s)")
    published = "exact, or model: rounded to the model's dtype, as in Dream's published code"
    add("--confidence-dtype", default="exact", metavar="KIND", help=f"{published} (default: %(default)s)")
    limit = "fill all slots that are at least so sure; --steps is then a limit"
    add("--threshold", type=float, metavar="P", help=limit)
    near = "rank slots by confidence times how much is known around them, known slots within about SIGMA counting"
    add("--certainty", type=float, metavar="SIGMA", help=near)
    add("--near-threshold", type=float, metavar="P", help="beside --threshold: enough near a slot that reaches that")
    add("--radius", type=int, default=4, metavar="N", help="how many slots away is near (default: %(default)s)")
    surest = "fill the n surest slots, n as large as (n+1)(1-confidence)<F allows"
    falls = "let --threshold fall to P (1-A) while a block fills"
    add("--threshold-decay", type=float, default=0.0, metavar="A", help=f"{falls} (default: %(default)s, it stays)")
    add("--factor", type=float, metavar="F", help=surest)
    add("--entropy-bound", type=float, metavar="H", help="fill the surest slots whose entropies add up to H nats")
    without = "paper: their sum without the largest, or code: without the last, which is stricter"
    add("--entropy-form", default="paper", metavar="FORM", help=f"{without} (default: %(default)s)")
    add("--cfg-scale", type=float, default=0.0, metavar="S", help="guidance by the prompt (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="above 0 tokens are drawn (default: %(default)s)")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that make up P (default: all)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default: all)")
    add("--logits-eos-inf", action="store_true", help="never emit the token that ends a text")
    add("--confidence-eos-eot-inf", action="store_true", help="fill slots with a token that ends a text or a turn last")
    add("--seed", type=int, metavar="N", help="of the random numbers, in every row (default: new ones; see --stats)")
    add = parser.add_argument_group(
        "cache", "The policy and its options; each goes with the policies in brackets, see also dkv info."
    ).add_argument
    names = "none, decode, greedy, prefill, pd, prefix, dual, suffix, sliding, rollout, elastic or skip"
    add("--cache", default="none", metavar="POLICY", help=f"{names} (default: %(default)s)")
    add("--kv-cache-dtype", default="auto", help="auto, or int8: keys and values in 8 bits (default: %(default)s)")
    own = "default: the policy's own"
    often = "full pass every N steps, 0: never [decode, greedy, pd, rollout]"
    add("--refresh", type=int, metavar="N", help=f"{often} ({own})")
    window = "masked neighbours computed per slot [greedy], slots seen after the block [suffix], or masks [elastic]"
    add("--window", type=int, metavar="N", help=f"{window} ({own})")
    add("--tail", type=int, metavar="N", help=f"slots seen at the end of the answer [suffix] ({own})")
    add("--base", metavar="POLICY", help=f"prefix or dual: what is computed of what is seen [suffix] ({own})")
    add("--warmup", type=int, metavar="N", help=f"full passes at the start of a block [decode, pd] ({own})")
    add("--delayed", action="store_true", default=None, help="skip decoded slots of the block, too [prefix, dual]")
    add("--prefix-window", type=int, metavar="N", help=f"slots computed before the region [sliding] ({own})")
    add("--shift-rule", metavar="RULE", help=f"un, un_right or right: when Dream caches a slot [decode, pd] ({own})")
    add("--rollout-p", type=float, metavar="P", help=f"share of the attention that is computed anew [rollout] ({own})")
    add("--current-k", type=int, metavar="N", help=f"masks computed [rollout] ({own})")
    add("--sigma", type=float, metavar="SIGMA", help=f"as --certainty, to choose these masks [rollout] ({own})")
    shares = "the share of slots that goes on from each depth, such as 1/2@1/8+1/4@1/4"
    add("--shares", metavar="SHARES", help=f"{shares} [skip] ({own})")
    add(
        "--alpha",
        type=float,
        metavar="A",
        help=f"weight of confidences, against changes, in choosing these [skip] ({own})",
    )
    add("--block-every", type=int, metavar="N", help=f"all slots of the block go on every N steps [skip] ({own})")
    add("--prompt-every", type=int, metavar="N", help=f"the prompt is computed every N steps [skip] ({own})")
    add("--inflate-w", type=int, metavar="N", help=f"gaps of less than N slots are computed, too [rollout] ({own})")
    turned = "full pass once attention has changed to a cosine below G"
    add("--gamma", type=float, metavar="G", help=f"{turned} [elastic] ({own})")


def run(args: argparse.Namespace) -> int:
    prompts = of_first(lambda: read_prompts(args), args.device)
    import dkv
    from dkv.models.gemma import Gemma
    from dkv.tools.streaming import DraftStreamer, ProgressStreamer, draws_drafts
    from dkv.tools.text import answer, end_ids

    config, model, tokenizer, ids, mask = prepare(args, prompts)
    canvases = isinstance(model, Gemma)
    extra = own_settings(args, model.spec)
    # A model with canvases has its own ends, which may be more than a tokenizer says.
    if not (args.raw or canvases):
        # What follows the end of a text is not shown.
        config.update(eos_token_id=end_ids(tokenizer, model.spec))
    # Every draft costs a copy from the device: none where nobody sees it.
    streamer = None
    if draws_drafts() and not (args.json or args.no_stream):
        streamer = DraftStreamer(tokenizer, model.spec, args.raw)
    elif sys.stderr.isatty() and not canvases:
        streamer = ProgressStreamer(len(ids) * config.of_row("max_new_tokens", 0), model.spec.mask_token_id)
    try:
        output = dkv.generate(model, ids, mask, generation_config=config, streamer=streamer, **extra)
    finally:
        if streamer is not None:
            streamer.end()
    rows = output.sequences[:, ids.shape[1] :].tolist()
    texts = [answer(tokenizer, model.spec, row, args.raw) for row in rows]
    why = "the model ended it at once" if not args.raw else "its tokens have no text"
    notes = []
    for number, (text, row) in enumerate(zip(texts, rows, strict=True), 1):
        if row and not text:
            where = f"prompt {number}: the" if args.lines else "the"
            notes.append(f"{where} answer is empty, as {why}; --raw shows what follows the end")
    shown = isinstance(streamer, DraftStreamer)
    text = "" if shown else "".join(f"{text}\n" for text in texts)
    write(args, {"text": texts, "tokens": rows}, output.stats, text, notes)
    return 0


def write(
    args: argparse.Namespace, facts: dict[str, list], stats: Any, text: str, notes: list[str], begin: str = ""
) -> None:
    """Write an answer, as text or as JSON of the facts of every row; on standard error the notes, and what it cost.

    The line with what it cost starts with `begin`.
    """
    if args.json:
        facts = facts if args.lines else {name: values[0] for name, values in facts.items()}
        text = json.dumps({**facts, "stats": stats.to_dict()}) + "\n"
    sys.stdout.write(text)
    # Where nobody reads the answer, there is nothing to add.
    sys.stdout.flush()
    for note in notes:
        print(f"dkv {args.command}: {note}", file=sys.stderr)
    if args.stats:
        print(f"{begin}{summary(stats)}", file=sys.stderr)


def prepare(args: argparse.Namespace, prompts: list[str]) -> tuple[Any, Any, Any, Any, Any]:
    """What the arguments of `add_generation` ask for: settings, model, tokenizer, and ids [B, P] with their mask."""
    from dkv.engine.canvas import checked_run
    from dkv.engine.inputs import checked_inputs
    from dkv.models.gemma import Gemma
    from dkv.tools.text import encode

    config, model, tokenizer = load(args)
    draw_seeds(config, len(prompts))
    ids, mask = (t.to(model.device) for t in encode(tokenizer, prompts, args.chat))
    (checked_run if isinstance(model, Gemma) else checked_inputs)(model, ids, mask, config)
    return config, model, tokenizer, ids, mask


def load(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Settings, model and tokenizer that the arguments ask for."""
    import dkv
    from dkv.tools.text import turn_end_ids

    config = dkv.DiffusionConfig(**settings(args))
    ranks = ranks_of(args.device)
    where = {"ranks": ranks} if ranks else {"device": args.device}
    model = dkv.load(args.model, **where, **weights(args), **told(args))
    tokenizer = dkv.load_tokenizer(args.model)
    config.update(eot_token_id=turn_end_ids(tokenizer))
    return config, model, tokenizer


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that the arguments name; the newline that ends a file is not part of one.

    Raises:
        ValueError, OSError: as `read_source`; or every line is blank.
    """
    text, source = read_source(args, "prompt")
    text = text.removesuffix("\n") if source else text
    prompts = [line for line in text.split("\n") if line.strip()] if args.lines else [text]
    # An empty prompt is allowed where it was meant.
    if not any(prompts) and (args.lines or source):
        raise ValueError(f"no prompt: {source or 'PROMPT'} is empty")
    return prompts


def read_source(args: argparse.Namespace, name: str, newline: str | None = None) -> tuple[str, object]:
    """The text that the arguments name, and where it was read; None: it is an argument itself.

    Args:
        name: of the text in messages.
        newline: as for `open`; "" leaves the ends of lines as they are.

    Raises:
        ValueError: there is none, or two, or the input is not text.
        OSError: the file cannot be read.
    """
    text, source = args.prompt, None
    if args.file is not None and text is not None:
        raise ValueError(f"give a {name} or --file, not both")
    if args.file is None and text is None and sys.stdin.isatty():
        raise ValueError(f"no {name}: give one, or --file FILE, or pipe it in")
    try:
        if args.file is not None:
            source = args.file
            with source.open(encoding="utf-8", newline=newline) as stream:
                text = stream.read()
        elif text in (None, "-"):
            source = "standard input"
            if newline is not None and hasattr(sys.stdin, "reconfigure"):
                sys.stdin.reconfigure(newline=newline)
            text = sys.stdin.read()
        # Bytes that are not text in the system's encoding, which may be ASCII, arrive as halves of surrogate pairs.
        return text.encode("utf-8", "surrogateescape").decode("utf-8"), source
    except UnicodeError as error:
        raise ValueError(f"{source or name.upper()} is not text in {error.encoding}") from error


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of `dkv.DiffusionConfig` that the arguments ask for."""
    from dkv.engine.settings import DEFAULTS
    from dkv.policies import POLICY_OPTIONS, joined_policy

    given = {name: value for name, value in vars(args).items() if name in DEFAULTS or name in POLICY_OPTIONS}
    # An option of the policy that is left out is the policy's own; without a budget there are gaps to fill.
    given = {name: value for name, value in given.items() if name in DEFAULTS or value is not None}
    return joined_policy({"max_new_tokens": 0, **given})


def summary(stats: Any) -> str:
    """What a generation cost, in one line."""
    from dkv.common.bar import counted

    tokens, passes = counted(stats.new_tokens, "token"), counted(stats.passes, "pass")
    return (
        f"{tokens} in {stats.seconds:.2f} s ({stats.tokens_per_second:.1f} tokens/s), "
        f"{passes} ({stats.full_passes} full), {stats.computed_share:.0%} of the slots computed, "
        f"seed {stats.seed}, {stats.settings['dtype'].removeprefix('torch.')} on {stats.settings['device']}"
    )
