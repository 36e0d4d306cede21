"""Results as text and as CSV: the columns of all tables, and the line that says what was measured on what."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from dkv.common import files

# The cells of a column: a format string such as "{speed:.2f}x", or a function of the result line.
Cell = str | Callable[[Any], str]


def cell(column: Cell, row: Any) -> str:
    """The text of a cell; of a format string nothing where one of its values is None or missing."""
    if callable(column):
        return column(row)
    names = [name.partition("[")[0] for _, name, *_ in Formatter().parse(column) if name]
    return "" if any(row.get(name) is None for name in names) else column.format_map(row)


def aligned(cells: Sequence[str], widths: Sequence[int], left: int = 1) -> str:
    """Cells in columns of these widths, the first `left` of them to the left and the others to the right."""
    pairs = zip(cells, widths, strict=True)
    return "  ".join(f"{text:{'<' if i < left else '>'}{width}}" for i, (text, width) in enumerate(pairs)).rstrip()


def columns(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Cells under their headings, `aligned` in columns as wide as they need."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join(aligned(line, widths, left) for line in (header, *lines))


def table(rows: Sequence[Any], cells: Mapping[str, Cell], left: int = 1) -> str:
    """A line per row: heading -> its cell. A column that is empty everywhere is left out."""
    lines = [[cell(column, row) for column in cells.values()] for row in rows]
    kept = [i for i in range(len(cells)) if any(line[i] for line in lines)]
    return columns([list(cells)[i] for i in kept], [[line[i] for i in kept] for line in lines], left)


def fixed(columns: Mapping[str, tuple[int, Cell]], row: Any = None, left: int = 1) -> str:
    """A line of a table that is printed as it comes, heading -> width and cell; without a row its headings."""
    texts = list(columns) if row is None else [cell(column, row) for _, column in columns.values()]
    return aligned(texts, [width for width, _ in columns.values()], left)


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
