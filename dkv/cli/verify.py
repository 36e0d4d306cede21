"""`dkv verify`: replay recorded runs of the published code."""

import argparse
from pathlib import Path

SUMMARY = "Replay recorded runs of published code and compare tokens, computed slots and logits."

EXAMPLES = """\
examples:
  dkv verify tests/golden                     every recorded model
  dkv verify -q tests/golden/llada_mha        failures alone, and the count

A run that documents a fault of the published code is skipped, with the reason. The exit code is 0
if no run failed, 1 if one did, 2 if there are none.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a model folder, or a folder of them")
    parser.add_argument("-q", "--quiet", action="store_true", help="print failures and the closing line alone")


def run(args: argparse.Namespace) -> int:
    from dkv.common.bar import Bar
    from dkv.tools.verify import find_cases, verify

    total = sum(len(find_cases(folder)) for folder in args.folders)
    counts = {"PASS": 0, "FAIL": 0, "SKIP": 0}
    with Bar(total, "run") as bar:
        for case, verdict, found in verify(args.folders):
            counts[verdict] += 1
            if verdict == "FAIL" or not args.quiet:
                bar.print(f"{verdict} {case.folder.resolve().name}/{case.name}  {found}")
            bar.update()
    skipped = f", {counts['SKIP']} skipped" if counts["SKIP"] else ""
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed{skipped}")
    return 1 if counts["FAIL"] else 0
