"""The fastest way to generate that loses little, found on a model's own problems."""

from collections.abc import Sequence

from dkv.bench.accuracy.frontier import ALIKE, Row
from dkv.bench.contenders import Contender


def lost(row: Row, points: float) -> bool:
    """Whether it is sure, as far as the 95 % intervals tell, that a contender loses more than so many points.

    Texts are lost where it is sure that they are less likely than those of plain decoding by more than `ALIKE`.
    """
    return row.get("change_high", 0.0) < -points or row.get("nats_low", 0.0) > ALIKE


def best(rows: Sequence[Row], points: float) -> Row | None:
    """The fastest that loses no more than so many points on these problems; None: plain decoding alone does.

    Args:
        rows: of `quality.measure`, plain decoding first. Those that have not had all batches are out.
    """
    plain, *others = rows
    good = [row for row in others if _whole(row, plain) and not _loses(row, points) and row["speed"] > 1]
    return max(good, key=lambda row: row["speed"], default=None)


def _whole(row: Row, plain: Row) -> bool:
    return (row["problems"], row["texts"]) == (plain["problems"], plain["texts"])


def _loses(row: Row, points: float) -> bool:
    return row.get("change", 0.0) < -points or row.get("nats_change", 0.0) > ALIKE


def verdict(rows: Sequence[Row], points: float) -> str:
    """What to use, how sure that is, and how to write it."""
    found, count = best(rows, points), rows[0]["problems"]
    if rows[0].get("right") == 0 and count:
        return f"Plain decoding answers none of the {count} problems: nothing can be lost on them. Give easier ones."
    if found is None:
        return f"Nothing is faster than plain decoding and loses at most {points:g} points on these problems."
    said = [f"{found['label']}: {found['speed']:.2f}x plain"]
    if count:
        low, high = found["change_low"], found["change_high"]
        said.append(f"{found['change']:+.1f} points on {count} problems (95 %: {low:+.1f} to {high:+.1f})")
    if found["texts"]:
        low, high = found["nats_low"], found["nats_high"]
        said.append(f"{found['nats_change']:+.3f} nats a token (95 %: {low:+.3f} to {high:+.3f})")
    lines = [", ".join(said) + "."]
    if count and found["change_low"] < -points:
        lines.append(f"So few problems cannot rule out a loss of more than {points:g} points: give more of them.")
    return "\n".join(lines)


def in_python(contender: Contender) -> str:
    """The call, as it can be copied; N are the slots to fill."""
    policy = contender.settings["cache"]
    default = type(policy)()
    differing = {name: value for name, value in vars(policy).items() if value != getattr(default, name)}
    words = [
        f"cache=dkv.{type(policy).__name__}({', '.join(f'{name}={value!r}' for name, value in differing.items())})"
    ]
    words += [f"{name}={value!r}" for name, value in contender.settings.items() if name != "cache"]
    if contender.steps is not None:
        share = isinstance(contender.steps, float)
        words.append(f"steps=round({contender.steps:g} * N)" if share else f"steps={contender.steps}")
    return f"dkv.generate(model, **encoding, max_new_tokens=N, {', '.join(words)})"
