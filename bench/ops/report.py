"""What a benchmark states beside its time: bytes, FLOPs, and the share of the floor that it reaches."""

from typing import Any

FOOTNOTE = """\
floor = the larger of bytes / copy rate and FLOPs / matrix rate: no way that moves all data through memory is faster.
Bytes and FLOPs are those that cannot be avoided: inputs read once, outputs written once. share = floor / median.
More than 100 %: the data fit in the cache, which is faster than the memory that the copy went through; the product is
of a shape that suits the machine better than a large square; or something else ran while the rates were taken.
Operations on a few KB take what their calls cost, launch and wait included, and reach next to nothing of the floor.
vs eager = median of eager / median: above 1 is faster than eager."""
HEADS = ("median us", "MB", "MFLOP", "GB/s", "GFLOP/s", "share", "vs eager")


def floor_seconds(nbytes: int, flops: int, rates: dict[str, float]) -> float:
    """The least time of an operation on a machine of these `rates`."""
    return max(nbytes / rates["copy_bytes_per_s"], flops / rates["matrix_flops_per_s"])


def timed(row: dict[str, Any], median: float, eager: float | None) -> dict[str, Any]:
    """What follows from the median seconds of a row, and from those of the eager way."""
    values = {
        "median_seconds": median, "bytes_per_s": row["bytes"] / median, "flops_per_s": row["flops"] / median,
        "floor_share": row["floor_seconds"] / median,
    }  # fmt: skip
    return values | ({} if eager is None else {"speed_against_eager": eager / median})


def _line(row: dict[str, Any], width: int) -> str:
    cells = [f"{row['bytes'] / 1e6:.4g}", f"{row['flops'] / 1e6:.4g}"]
    if "median_seconds" in row:
        rates = [f"{row['bytes_per_s'] / 1e9:.4g}", f"{row['flops_per_s'] / 1e9:.4g}", f"{row['floor_share']:.1%}"]
        cells = [f"{row['median_seconds'] * 1e6:.1f}", *cells, *rates]
        cells.append(f"{row['speed_against_eager']:.2f}x" if "speed_against_eager" in row else "-")
    else:
        cells = ["not timed", *cells, *["-"] * 4]
    return f"{row['operation']:19}{row['shape']:{width}}{row['way']:8}" + "".join(f"{cell:>11}" for cell in cells)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines for the terminal: the ways of one shape together, and what the columns mean."""
    width = max(len(row["shape"]) for row in rows) + 2
    lines, before = [f"{'operation':19}{'shape':{width}}{'way':8}" + "".join(f"{head:>11}" for head in HEADS)], None
    for row in rows:
        here = row["operation"], row["shape"]
        lines += ["", _line(row, width)] if before not in (None, here) else [_line(row, width)]
        before = here
    first = rows[0]
    copy, matrix = first["copy_bytes_per_s"] / 1e9, first["matrix_flops_per_s"] / 1e9
    where = f"measured in this run on {first['device']}, threads of torch: {first['threads']}"
    rates = f"copy {copy:.1f} GB/s (read + write), {first['dtype']} matrix product {matrix:.0f} GFLOP/s"
    return [*lines, "", f"{where}: {rates}", *FOOTNOTE.splitlines()]
