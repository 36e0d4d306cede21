"""The fastest way to generate that loses little, found on a model's own problems."""

from collections.abc import Sequence

from dkv.bench.accuracy.frontier import ALIKE, Row, too_hard
from dkv.bench.contenders import WEIGHTS, Contender


def lost(row: Row, points: float) -> bool:
    """Whether it is sure, as far as the 95 % intervals tell, that a contender loses more than so many points.

    Texts are lost where it is sure that they are less likely than those of plain decoding by more than `ALIKE`.
    """
    return row.get("change_high", 0.0) < -points or row.get("nats_low", 0.0) > ALIKE


def best(rows: Sequence[Row], points: float) -> Row | None:
    """The fastest that loses no more than so many points on these problems.

    None: plain decoding alone does, or the problems are too hard to tell and there are no texts.

    Args:
        rows: of `quality.measure`, plain decoding first. Those that have not had all batches are out.
    """
    plain, *others = rows
    if too_hard(plain) and not plain["texts"]:
        return None
    good = [row for row in others if _whole(row, plain) and not _loses(row, points) and row["speed"] > 1]
    return max(good, key=lambda row: row["speed"], default=None)


def _whole(row: Row, plain: Row) -> bool:
    return (row["problems"], row["texts"]) == (plain["problems"], plain["texts"])


def _loses(row: Row, points: float) -> bool:
    return row.get("change", 0.0) < -points or row.get("nats_change", 0.0) > ALIKE


def verdict(rows: Sequence[Row], points: float) -> str:
    """What to use, how sure that is, and how to write it."""
    found, hard = best(rows, points), too_hard(rows[0])
    lines = [f"{hard} Give easier problems."] if hard else []
    if found is not None:
        lines += _said(found, points)
    elif not hard or rows[0]["texts"]:
        lines.append(f"Nothing is faster than plain decoding and loses at most {points:g} points on these problems.")
    return "\n".join(lines)


def _said(row: Row, points: float) -> list[str]:
    """Lines of what the fastest wins and loses."""
    said = [f"{row['label']}: {row['speed']:.2f}x plain"]
    if count := row["problems"]:
        interval = f"{row['change_low']:+.1f} to {row['change_high']:+.1f}"
        said.append(f"{row['change']:+.1f} points on {count} problems (95 %: {interval})")
    if row["texts"]:
        interval = f"{row['nats_low']:+.3f} to {row['nats_high']:+.3f}"
        said.append(f"{row['nats_change']:+.3f} nats a token (95 %: {interval})")
    few = f"So few problems cannot rule out a loss of more than {points:g} points: give more of them."
    return [", ".join(said) + ".", *([few] if count and row["change_low"] < -points else [])]


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
    loading = ""
    if contender.weights is not None:
        told = ", ".join(f"{name}={value!r}" for name, value in WEIGHTS[contender.weights].items())
        loading = f"model = dkv.load(name, {told})\n"
    return f"{loading}dkv.generate(model, **encoding, max_new_tokens=N, {', '.join(words)})"
