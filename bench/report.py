"""Results as text and as CSV: the columns of all tables, and the line that says what was measured on what."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dkv.common import files


def aligned(cells: Sequence[str], widths: Sequence[int], left: int = 1) -> str:
    """Cells in columns of these widths, the first `left` of them to the left and the others to the right."""
    pairs = zip(cells, widths, strict=True)
    return "  ".join(f"{cell:{'<' if i < left else '>'}{width}}" for i, (cell, width) in enumerate(pairs)).rstrip()


def columns(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Cells under their headings, `aligned` in columns as wide as they need."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join(aligned(line, widths, left) for line in (header, *lines))


def table(rows: Sequence[Any], cells: Mapping[str, Callable[[Any], str]], left: int = 1) -> str:
    """A line per row: heading -> the text of its cell. A column that is empty everywhere is left out."""
    lines = [[cell(row) for cell in cells.values()] for row in rows]
    kept = [i for i in range(len(cells)) if any(line[i] for line in lines)]
    return columns([list(cells)[i] for i in kept], [[line[i] for i in kept] for line in lines], left)


def shown(value: float | None, form: str) -> str:
    """A number in a form such as "{:.2f}x"; nothing for None."""
    return "" if value is None else form.format(value)


def machine_line(facts: dict[str, Any]) -> str:
    """On what something was measured, in one line: model, machine, versions, day."""
    where = facts.get("card") or f"{facts['processor']}, threads: {facts['threads']} of {facts['cores']} cores"
    size = f"{facts['parameters'] / 1e6:,.1f} M parameters, {facts['dtype']}"
    return f"{facts['model']} ({size}) on {where}; torch {facts['torch']}, dkv {facts['dkv']}, {facts['date'][:10]}"


def save_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of one kind under the names of the first; lists and dicts as JSON, and nothing for None."""
    with files.writing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()})
