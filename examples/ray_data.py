"""Answer a data set on a cluster, with Ray Data: actors that hold a model, results by id.

    pip install 'dkv[ray]'
    python examples/ray_data.py tiny prompts.jsonl answers --actors 2 --max-new-tokens 64 --cache decode

Repeated after a failure, it leaves out what the folder has already.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import ray

import dkv


class Answers:
    """An actor: a model, which answers batches of rows."""

    def __init__(self, model: str, settings: dict[str, Any]):
        self.model, self.tokenizer, self.settings = dkv.load(model), dkv.load_tokenizer(model), settings

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        rows = [{"id": str(row), "prompt": text} for row, text in zip(batch["id"], batch["prompt"], strict=True)]
        # Seeds are made of the ids: a block that is done again gives the same.
        records = dkv.map(self.model, rows, tokenizer=self.tokenizer, progress=False, **self.settings)
        names = ("id", "text", "tokens", "finish_reason", "seed", "error")
        # Every row of a data set has all fields.
        empty = {"text": "", "tokens": [], "finish_reason": "", "seed": 0, "error": ""}
        return {name: [{**empty, **record}[name] for record in records] for name in names}


def done(folder: Path) -> set[str]:
    """Ids that have an answer; a file that was being written may have no end."""
    found = set()
    for path in folder.glob("*.json"):
        for line in path.read_text("utf-8").split("\n")[:-1]:
            found.add(json.loads(line)["id"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer a data set with Ray Data.")
    parser.add_argument("model", help="a bundled model, a folder that all nodes see, or a hub id")
    parser.add_argument("data", type=Path, help="JSON lines with id and prompt")
    parser.add_argument("out", type=Path, help="folder, for a file of JSON lines from each block")
    parser.add_argument("--actors", type=int, default=1, help="that hold a model")
    parser.add_argument("--gpus", type=float, default=0, help="of an actor")
    parser.add_argument("--cpus", type=float, default=1, help="of an actor; Ray needs one beside them, to read")
    parser.add_argument("--batch", type=int, default=256, help="rows that an actor takes at a time")
    parser.add_argument("--blocks", type=int, help="files of results (default: as Ray decides)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--cache", default="none")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("max_new_tokens", "cache", "temperature", "seed")}

    rows = ray.data.read_json(str(args.data), lines=True)
    known = done(args.out)
    rows = rows.filter(lambda row: str(row["id"]) not in known)
    if args.blocks is not None:
        rows = rows.repartition(args.blocks)
    answers = rows.map_batches(
        Answers,
        fn_constructor_args=(args.model, settings),
        batch_size=args.batch,
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        num_cpus=args.cpus,
        num_gpus=args.gpus,
    )
    answers.write_json(str(args.out))


if __name__ == "__main__":
    main()
