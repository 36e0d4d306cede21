"""Where results go: a table on the terminal, JSON, CSV."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dkv.common import files

# Speeds nearer to 1 than this say nothing.
CLEAR = 0.02


def columns(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Cells under their headings, the first `left` columns to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(line)).rstrip()
        for line in (header, *lines)
    )


def machine_line(facts: dict[str, Any]) -> str:
    """On what something was measured, in one line: model, machine, versions, day."""
    where = facts.get("card") or f"{facts['processor']}, threads: {facts['threads']} of {facts['cores']} cores"
    size = f"{facts['parameters'] / 1e6:,.1f} M parameters, {facts['dtype']}"
    return f"{facts['model']} ({size}) on {where}; torch {facts['torch']}, dkv {facts['dkv']}, {facts['date'][:10]}"


def verdict(found: dict[str, Any]) -> str:
    """What the rows of a comparison (`dkv.bench.compare`) at one batch mean, in a few plain sentences."""
    own = {row["policy"]: row for row in found["rows"] if row["way"] == "dkv"}
    plain, cached = own["plain"], [row for name, row in own.items() if name != "plain"]
    said = []
    if cached:
        best = max(cached, key=lambda row: row["speed"])
        canvas = f"{plain['prompt']} + {plain['new']} slots at batch {plain['batch']}"
        said.append(f"Fastest for {canvas}: {best['policy']}, {best['speed']:.2f}x plain.")
        pays = [row["policy"] for row in cached if row["slowest"] > 1 + CLEAR]
        loses = [row["policy"] for row in cached if row["fastest"] < 1 - CLEAR]
        unclear = [row["policy"] for row in cached if row["policy"] not in pays + loses]
        kinds = (("pays for", pays), ("does not pay for", loses), ("makes no clear difference for", unclear))
        parts = [f"{kind} {', '.join(names)}" for kind, names in kinds if names]
        if len(plain["seconds"]) == 1:
            # How much the runs vary is not known.
            said.append("One round cannot tell whether the cache pays: give --rounds 3.")
        else:
            said.append(f"The cache {'; it '.join(parts)}.")
    if cached and plain["exact"] == 0:
        said.append("Plain answers none of the problems exactly: what a cache loses cannot be told from them.")
    elif cached and plain["exact"] is not None:
        good = [row for row in cached if row["exact"] >= plain["exact"]]
        name = max(good, key=lambda row: row["speed"])["policy"] if good else "none"
        said.append(f"Plain answers {plain['exact']:.0%} exactly; the fastest that answers as many: {name}. "
                    "Small losses take more problems to see: dkv eval.")  # fmt: skip
    over = [f"{name} {row['over_eager']:.2f}x" for name, row in own.items() if row["over_eager"] is not None]
    if over:
        said.append(f"Against the eager baseline of the same policy: {', '.join(over)}.")
    return "\n".join(said)


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write all figures of a document."""
    files.write_json(path, content, indent=1)


def save_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of one kind under the names of the first; lists and dicts as JSON, and nothing for None."""
    with files.writing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()})
