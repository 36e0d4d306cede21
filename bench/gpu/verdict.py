"""What a run says: what bounds a step, how ways to generate compare, and which goals are met."""

from collections.abc import Callable
from typing import Any

from dkv.bench.lineup import PLAIN
from dkv.bench.report import table

# By the part of a step, the calls that it is made of when they are taken alone.
ALONE = {
    "products": ("products",),
    "attention": ("cached_attention",),
    "others": ("rope_scatter_", "rms_norm", "swiglu", "choose_token"),
}
# Length, and how many times as fast as plain decoding Decode(8) has to be.
SPEEDUPS = {512: 1.8, 1024: 2.8, 2048: 4.0}
# A cached step of at most so many slots is to take at most so much of the time for which its weights are copied.
FEW, SLACK = 64, 1.25
REPLAY_MS = 0.3


def _rows(content: dict[str, Any], part: str, key: str) -> list[dict[str, Any]]:
    """The rows of a part that have a figure."""
    return [row for row in content["parts"].get(part, {}).get("rows", []) if key in row]


def _steps(content: dict[str, Any]) -> list[dict[str, Any]]:
    return _rows(content, "profile", "device_ms")


def bounds(content: dict[str, Any]) -> list[dict[str, Any]]:
    """By kind of step, its time on the device and what it is made of, and what bounds it where it is not replayed."""
    found, counted = [], {row["name"]: row["launches"] for row in _rows(content, "profile", "kernels")}
    half = {(row["slots"], row["active"]): row["device_ms"] for row in _steps(content) if not row["weights"]}
    for row in _rows(content, "profile", "alone_ms"):
        took = {name: sum(row["alone_ms"].get(call, 0.0) for call in calls) for name, calls in ALONE.items()}
        device = row.get("device_ms")
        whole = {"step": row["name"], "host": row["host_ms"], "device": device, **took}
        whole["launches"] = counted.get(f"kernels, {row['name']}")
        if device is not None:
            of_half = half.get((row["slots"], row["active"]))
            whole["of bf16"] = device / of_half if row["weights"] and of_half else None
            whole["rest"] = device - sum(took.values())
            whole["bound"] = "host" if row["host_ms"] > device else max(ALONE, key=took.get)
        found.append(whole)
    return found


def goals(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals that a GPU decides: what was measured, what is wanted, and whether it is met."""
    found = []

    def add(goal: str, value: float, wanted: float, met: bool) -> None:
        found.append({"goal": goal, "value": value, "wanted": wanted, "met": "met" if met else "missed"})

    copied = {row["weights"]: row["ms"] for row in _rows(content, "profile", "bytes_per_s")}
    for row in _steps(content):
        if row["weights"] in copied and row["active"] is not None and row["active"] <= FEW:
            ratio = row["device_ms"] / copied[row["weights"]]
            add(f"{row['name']} / weights at copy bandwidth, at most", ratio, SLACK, ratio <= SLACK)
    for row in _rows(content, "profile", "replay_host_ms"):
        if row["active"] is not None:
            host = row["replay_host_ms"]
            add(f"{row['name']} replayed, milliseconds of the host, at most", host, REPLAY_MS, host <= REPLAY_MS)
    device = {row["name"]: row["device_ms"] for row in _steps(content)}
    for slots, wanted in SPEEDUPS.items():
        full, cached = device.get(f"S{slots} full"), device.get(f"S{slots} cached N36")
        if full and cached:
            # A generation of 64 tokens in 64 steps, 9 of them full.
            ratio = 64 * full / (9 * full + 55 * cached)
            add(f"S{slots} decode 8 over {PLAIN}, by the time of their steps, at least", ratio, wanted, ratio >= wanted)
        for row in _rows(content, "steps", "ratio_to_plain"):
            if row["name"].endswith(f" B1 S{slots} decode 8") and row["way"] == "triton":
                ratio = row["ratio_to_plain"]
                add(f"{row['name']} over {PLAIN}, at least", ratio, wanted, ratio >= wanted)
    return found


def _number(name: str, form: str = ".3f") -> Callable[[dict[str, Any]], str]:
    return lambda row: "" if row.get(name) is None else format(row[name], form)


BOUNDS = {name: _number(name) for name in ("host", "device", "of bf16", *ALONE, "rest")}
BOUNDS = {"step": "{step}", "launches": "{launches}", **BOUNDS, "bound by": "{bound}"}
GENERATIONS = {"generation": "{name}", "by": "{way}", "ms a step": _number("ms_per_step", ".2f")}
GENERATIONS |= {"to plain": "{ratio_to_plain:.2f}x", "GB": _number("peak_gb", ".1f")}
GOALS = {"goal": "{goal}", "measured": _number("value", ".2f"), "wanted": "{wanted}", "": "{met}"}


def problems(content: dict[str, Any]) -> list[str]:
    """What failed, was left out or did not end by itself, by part."""
    lines = []
    for name, part in content["parts"].items():
        wrong = [row for row in part["rows"] if "traceback" in row or any(row.get("tracebacks", {}))]
        counts = {f"{len(wrong)} failed": wrong, f"{len(part['left_out'])} left out": part["left_out"]}
        said = [text for text, some in counts.items() if some] + part.get("problems", [])
        if said:
            lines.append(f"{name}: {'; '.join(said)}")
        lines += [f"    {row.get('name', 'stopped')}: {row.get('error', row.get('errors'))}" for row in wrong]
    return lines


def text(content: dict[str, Any]) -> str:
    """The tables of a run, as far as it went."""
    said = []
    if steps := bounds(content):
        said += ["\n== what bounds a step, milliseconds: launched by the host, or replayed on the device and in parts"]
        said += [table(steps, BOUNDS)]
    if generations := [row for part in ("steps", "more") for row in _rows(content, part, "ms_per_step")]:
        said += ["\n== generations; to plain: seconds of plain decoding by the kernels / own"]
        said += [table(generations, GENERATIONS, left=2)]
    if met := goals(content):
        said += ["\n== goals", table(met, GOALS)]
    if wrong := problems(content):
        said += ["\n== failed or left out", *wrong]
    return "\n".join(said)
