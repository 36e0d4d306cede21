"""`dkv infill`: fill the gaps of a text, of known and of unknown length."""

import argparse
import re

from dkv.cli import generate
from dkv.cli.several import of_first

SUMMARY = "Fill the gaps of a text with a diffusion language model, and change nothing else."

EXAMPLES = """\
examples:
  dkv infill '+1 +2 -3 +1 -2 +3 +3 -1 -2 +1 +2 -3 -1 +2 +2 -1 +3 -2 -3 +1 +2=51 53 [MASK:5] 49 52 55 54 52 53 55 52'
  dkv infill --gap 8 '+1 +2 -3 +1 -2 +3 +3 -1 -2 +1 +2 -3 -1 +2 +2 -1 +3 -2 -3 +1 +2=51 53[MASK]49 52 55 54 52 53 55 52'
  dkv infill --marker '#' '+1 +2 -3 +1 -2 +3 +3 -1 -2 +1 +2 -3 -1 +2 +2 -1 +3 -2 -3 +1 +2=51 53 ## 51 ## 52 55 54 52'
  dkv infill --model GSAI-ML/LLaDA-8B-Base --gap 12 --cache decode 'The capital of France is[MASK]. It is on the Seine.'
  dkv infill --lines --gap 8 < texts.txt > filled.txt

A marker stands for one token, so a row of n markers for n, and so does [MASK:n] (any marker in brackets may hold a
number). With --gap N a marker without a number stands for a gap of 0 to N tokens. Its length is the one that makes
the text beside it likeliest, which is a heuristic of ours; gaps are decided from left to right. The more text there is
on both sides, the better: to go on at the end of a text, use dkv generate. How the tokenizer writes its own
mask is a marker, too.

The text outside the gaps comes out as it went in, byte for byte. Every piece of it is tokenized by itself. With --lines
every line is a text of its own, and lines without a gap are handed on. Write a text that begins with a dash after `--`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    generate.add_source(parser, "text", "text with gaps", "every line is a text; those with gaps make one batch")
    add = parser.add_argument_group("gaps").add_argument
    add("--marker", default="[MASK]", metavar="TEXT", help="stands for a missing token (default: %(default)s)")
    add("--gap", type=int, metavar="N", help="a marker without a number stands for 0 to N tokens (default: for one)")
    generate.add_model(parser)
    generate.add_decoding(parser)
    raw, stats = "write special tokens in the gaps out", "lengths of the gaps, time, passes"
    generate.add_output(parser, raw, stats, "text, gaps, tokens")


def run(args: argparse.Namespace) -> int:
    if args.gap is not None and args.gap < 1:
        raise ValueError(f"--gap must be at least 1, got {args.gap}: it is the most tokens that a gap may have")
    lines = of_first(lambda: read_lines(args), args.device)
    from dkv.tools.marked import GapStreamer, marked

    for text, _ in lines:
        # A wrong number in a marker is found before a model is loaded.
        marked(text, args.marker)
    import dkv
    from dkv.engine.inputs import check_settings
    from dkv.tools.streaming import draws_drafts
    from dkv.tools.text import filling_text, mask_text

    config, model, tokenizer = generate.load(args)
    check_settings(model, config)
    own = mask_text(tokenizer, model.spec)
    texts = [marked(text, args.marker, own, args.gap) for text, _ in lines]
    with_gaps = [number for number, text in enumerate(texts) if text.gaps]
    if not with_gaps:
        raise ValueError(f"no gap: there is no {args.marker} in the text{f', and no {own}' if own else ''}")
    generate.draw_seeds(config, len(with_gaps))
    streamer = GapStreamer(tokenizer, model.spec) if draws_drafts() and not (args.json or args.no_stream) else None
    found = dkv.fill_gaps(model, [texts[number].tokens(tokenizer) for number in with_gaps], config, streamer)
    tokens: list[list[list[int]]] = [[] for _ in lines]
    for number, fillings in zip(with_gaps, found.fillings, strict=True):
        tokens[number] = fillings
    gaps = [[filling_text(tokenizer, filling, args.raw) for filling in fillings] for fillings in tokens]
    filled = [text.joined(fillings) for text, fillings in zip(texts, gaps, strict=True)]
    if streamer is not None:
        streamer.finish(filled)
    text = "" if streamer is not None else "".join(text + end for text, (_, end) in zip(filled, lines, strict=True))
    notes, lengths = [], []
    for row, (fillings, found_texts) in enumerate(zip(tokens, gaps, strict=True), 1):
        for number, (filling, found_text) in enumerate(zip(fillings, found_texts, strict=True), 1):
            lengths.append(len(filling))
            if filling and not found_text:
                where = f"line {row}, gap {number}" if args.lines else f"gap {number}"
                why = "the model put special tokens there, such as the end of a text; --raw writes them out"
                notes.append(f"{where} is empty: {why}")
    begin = f"gaps of {', '.join(map(str, lengths))} tokens; "
    generate.write(args, {"text": filled, "gaps": gaps, "tokens": tokens}, found.stats, text, notes, begin)
    return 0


def read_lines(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The texts that the arguments name, each with the end of line behind it, which is not part of it.

    Raises:
        ValueError, OSError: as `read_source`.
    """
    text, source = generate.read_source(args, "text", newline="")
    parts = re.findall(r"[^\n]*\n|[^\n]+", text) if args.lines else [text]
    lines = []
    for part in parts:
        body = part.removesuffix("\n").removesuffix("\r") if part.endswith("\n") and (args.lines or source) else part
        # An argument has no end of line, and gets one in the output.
        lines.append((body, part[len(body) :] if source else "\n"))
    return lines
