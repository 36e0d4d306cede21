"""What a benchmark states beside its time: bytes, FLOPs, and the share of the floor that it reaches."""

from typing import Any

from dkv.bench import report

FOOTNOTE = """\
floor = the larger of bytes / copy rate and FLOPs / matrix rate: no way that moves all data through memory is faster.
Bytes and FLOPs are those that cannot be avoided: inputs read once, outputs written once. share = floor / median.
More than 100 %: the data fit in the cache, which is faster than the memory that the copy went through; the product is
of a shape that suits the machine better than a large square; or something else ran while the rates were taken.
Operations on a few KB take what their calls cost, launch and wait included, and reach next to nothing of the floor.
vs eager = median of eager / median: above 1 is faster than eager."""
CELLS = {
    "operation": lambda row: row["operation"],
    "shape": lambda row: row["shape"],
    "way": lambda row: row["way"],
    "median us": lambda row: _number(row, "median_seconds", "{:.1f}", 1e-6) if "median_seconds" in row else "not timed",
    "MB": lambda row: _number(row, "bytes", "{:.4g}", 1e6),
    "MFLOP": lambda row: _number(row, "flops", "{:.4g}", 1e6),
    "GB/s": lambda row: _number(row, "bytes_per_s", "{:.4g}", 1e9),
    "GFLOP/s": lambda row: _number(row, "flops_per_s", "{:.4g}", 1e9),
    "share": lambda row: _number(row, "floor_share", "{:.1%}"),
    "vs eager": lambda row: _number(row, "speed_against_eager", "{:.2f}x"),
}


def floor_seconds(nbytes: int, flops: int, rates: dict[str, float]) -> float:
    """The least time of an operation on a machine of these `rates`."""
    return max(nbytes / rates["copy_bytes_per_s"], flops / rates["matrix_flops_per_s"])


def timed(row: dict[str, Any], median: float, eager: float | None) -> dict[str, Any]:
    """What follows from the median seconds of a row, and from those of the eager way."""
    values = {"median_seconds": median, "bytes_per_s": row["bytes"] / median, "flops_per_s": row["flops"] / median}
    values["floor_share"] = row["floor_seconds"] / median
    return values | ({} if eager is None else {"speed_against_eager": eager / median})


def _number(row: dict[str, Any], name: str, form: str, unit: float = 1) -> str:
    return form.format(row[name] / unit) if name in row else "-"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines for the terminal: the ways of one shape together, and what the columns mean."""
    head, *found = report.table(rows, CELLS, left=3).splitlines()
    lines = [head]
    for before, row, line in zip([None, *rows], rows, found, strict=False):
        other = before is not None and any(before[name] != row[name] for name in ("operation", "shape"))
        lines += ["", line] if other else [line]
    first = rows[0]
    copy, matrix = first["copy_bytes_per_s"] / 1e9, first["matrix_flops_per_s"] / 1e9
    where = f"measured in this run on {first['device']}, threads of torch: {first['threads']}"
    rates = f"copy {copy:.1f} GB/s (read + write), {first['dtype']} matrix product {matrix:.0f} GFLOP/s"
    return [*lines, "", f"{where}: {rates}", *FOOTNOTE.splitlines()]
