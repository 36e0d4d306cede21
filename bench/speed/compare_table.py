"""What a comparison of policies says: its table, and what it means in words."""

from typing import Any

from dkv.bench import report
from dkv.bench.report import shown

# Speeds nearer to 1 than this say nothing.
CLEAR = 0.02
CELLS = {
    "policy": lambda row: row["policy"] if row["way"] == "dkv" else f"  {row['way']}",
    "tokens/s": lambda row: f"{row['tokens_per_second']:.1f}",
    "speed": lambda row: f"{row['speed']:.2f}x",
    "range": lambda row: f"{row['slowest']:.2f}-{row['fastest']:.2f}" if len(row["seconds"]) > 1 else "",
    "full ms": lambda row: shown(row["full_ms"], "{:.1f}"),
    "cached ms": lambda row: shown(row["cached_ms"], "{:.1f}"),
    "passes (full)": lambda row: f"{row['passes']} ({row['full_passes']})",
    "computed": lambda row: f"{row['computed_share']:.0%}",
    "peak MB": lambda row: shown(row["peak_mb"], "{:.1f}"),
    "same": lambda row: f"{row['same_tokens']:.1%}",
    "exact": lambda row: shown(row["exact"], "{:.0%}"),
    "over eager": lambda row: shown(row["over_eager"], "{:.2f}x"),
}
MEANING = """\
speed: against dkv's plain run of the same round. full ms, cached ms: a step. computed: slots, against plain.
same: tokens as in dkv's plain run; eager: as in dkv's run of the policy."""


def table(found: dict[str, Any]) -> str:
    """The rows of a comparison at one batch."""
    return f"{report.table(found['rows'], CELLS)}\n\n{MEANING}"


def whole_table(found: dict[str, Any]) -> str:
    """All of a comparison: size, table and meaning of every batch, and why a policy has no baseline."""
    batches = dict.fromkeys(row["batch"] for row in found["rows"])
    parts = [one_batch([row for row in found["rows"] if row["batch"] == batch]) for batch in batches]
    return "\n".join(["\n\n".join(parts), *filter(None, [refusals(found["refused"])])])


def one_batch(rows: list[dict[str, Any]]) -> str:
    """What was compared, and what it gave."""
    row, found = rows[0], {"rows": rows}
    size = f"{row['prompt']} + {row['new']} slots, steps: {row['steps']}, batch: {row['batch']}"
    return "\n\n".join((f"{size}, rounds: {len(row['seconds'])}", table(found), verdict(found)))


def refusals(refused: dict[str, str]) -> str:
    """Why policies have no baseline, a line per reason; what was asked for is in the table."""
    reasons = {policy: why.partition(", got ")[0] for policy, why in refused.items()}
    return "\n".join(
        f"No eager baseline for {', '.join(policy for policy in reasons if reasons[policy] == reason)}: {reason}"
        for reason in dict.fromkeys(reasons.values())
    )


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
        exact = f"Plain answers {plain['exact']:.0%} exactly; the fastest that answers as many: {name}."
        said.append(f"{exact} Small losses take more problems to see: dkv eval.")
    over = [f"{name} {row['over_eager']:.2f}x" for name, row in own.items() if row["over_eager"] is not None]
    if over:
        said.append(f"Against the eager baseline of the same policy: {', '.join(over)}.")
    return "\n".join(said)
