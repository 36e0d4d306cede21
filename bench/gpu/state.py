"""The operations on the state of the rows: what a step does beside the layers of the model."""

from typing import Any

import torch
from torch import Tensor

from dkv import kernels
from dkv.bench.gpu.cases import Case, Inputs, Sizes, distinct, nbytes
from dkv.kernels.commit.reference import ENTROPY_RULES, Chosen, Pass, Rules, State
from dkv.kernels.plan.reference import FIELDS

# Steps of a schedule; of tokens there are so many that ends among them are met.
STEPS, TOKENS = 4, 50
# By rule of the commit, bounds that some slots fulfil.
BOUNDS = {
    "fixed": {},
    "threshold": {"bound": -0.7},
    "factor": {"bound": 0.5},
    "entropy_sum": {"bound": 2.0},
    "entropy": {"bound": 2.0},
    "near": {"bound": -0.1, "near": -0.7, "radius": 3},
}


def _rows(z: Sizes, device: torch.device) -> Inputs:
    """Rows in the middle of a generation: three quarters are to fill, and about half of these have a token."""
    b, s = z.batch, z.slots
    to_fill = (torch.arange(s) >= s // 4).expand(b, s)
    table = torch.randint(0, s // 2 + 1, (b, STEPS, len(FIELDS)))
    table[..., FIELDS.index("index")] = torch.arange(STEPS)
    table[..., FIELDS.index("stop")] += s // 2 + 1
    table[..., FIELDS.index("full")] = int(z.active == s)
    masked, spare = to_fill & (torch.rand(b, s) < 0.5), torch.zeros(b, 1, dtype=torch.bool)
    made = {
        "masked": torch.cat((masked, spare), 1),
        "rank": torch.where(to_fill, to_fill.cumsum(1) - 1, -1),
        "active": torch.zeros(b, s, dtype=torch.bool).scatter_(1, distinct("cpu", b, z.active, s), True),
        "now": table[:, 0].clone(),
        "table": table,
        "lengths": torch.full((b,), s),
        "cut": torch.zeros(b, dtype=torch.int64),
        "invalid": torch.zeros(b, dtype=torch.bool),
        "tokens": torch.randint(TOKENS, (b, s + 1)),
    }
    made = {name: x.to(device) for name, x in made.items()}
    # As a generation keeps it: the last column is left out.
    return made | {"masked": made["masked"][:, :-1]}


def _sizes(z: Sizes) -> dict[str, int]:
    return {"B": z.batch, "N": z.active, "S": z.slots}


def _mask(z: Sizes, device: torch.device, share: float) -> Tensor:
    return (torch.rand(z.batch, z.slots) < share).to(device)


def plan(z: Sizes, device: torch.device, kind: str = "open", **how: bool) -> Case:
    """The masks of a pass, and what is reported of it."""
    rows = _rows(z, device)
    names = ("now", "masked", "rank", "lengths", "active", "cut", "invalid")
    inputs = {name: rows[name] for name in names}
    if kind != "open":
        inputs["chosen"] = inputs["masked"] & _mask(z, device, 0.5)

    def run(x: Inputs) -> tuple[Tensor, ...]:
        positional, others = [x[name] for name in names[:5]], {name: x[name] for name in x if name not in names[:5]}
        return tuple(y for y in kernels.plan_pass(*positional, **others, kind=kind, **how) if y is not None)

    # Written: two masks, a count, and five lines of counts.
    written = 2 * nbytes(inputs["active"]) + 6 * nbytes(inputs["lengths"])
    return Case("plan_pass", _sizes(z), inputs, run, bytes=nbytes(*inputs.values()) + written)


def pack(z: Sizes, device: torch.device, shifted: bool = False) -> Case:
    """The entries of a pass: the tokens, slots and rows of what is computed, and the places of what is scored."""
    rows = _rows(z, device)
    inputs = {name: rows[name] for name in ("tokens", "active", "lengths")}
    inputs["scored"] = rows["active"] & rows["masked"]
    counts = [x.sum(1) for x in (inputs["active"], inputs["scored"], rows["masked"])]
    inputs["report"] = torch.stack([*counts, rows["cut"], rows["cut"]])
    total, names = z.batch * z.active, ("tokens", "active", "scored", "lengths", "report")
    return Case(
        "pack_pass",
        _sizes(z),
        inputs,
        lambda x: kernels.pack_pass(*(x[name] for name in names), total, total, shifted=shifted),
        # Of an entry a token is read, and six numbers are written; of a row the length, two counts and two starts.
        bytes=nbytes(inputs["active"], inputs["scored"]) + 8 * (7 * total + 5 * z.batch),
    )


def window(z: Sizes, device: torch.device, count: int = 4, size: int = 8) -> Case:
    """The masked slots nearest to `count` slots of every row."""
    inputs = {"chosen": _mask(z, device, 0.2), "masked": _rows(z, device)["masked"]}
    inputs["centers"] = distinct(device, z.batch, min(count, z.slots), z.slots)
    return Case(
        "with_masked_window",
        _sizes(z),
        inputs,
        lambda x: kernels.with_masked_window(**x, window=size),
        bytes=nbytes(*inputs.values(), inputs["chosen"]),
    )


def advance(
    z: Sizes,
    device: torch.device,
    rule: str = "fixed",
    ends: tuple[int, ...] | None = (TOKENS,),
    count: int = 1,
    dtype: torch.dtype = torch.float32,
    **how: Any,
) -> Case:
    """A step is taken: `count` slots of every row are filled, and ends are looked for, which by default no row has.

    So a call that is repeated does the same again. Confidences tie.
    """
    rows, size = _rows(z, device), (z.batch * z.active,)
    inputs = {name: rows[name] for name in State._fields if name in rows}
    inputs |= {"fresh": _mask(z, device, 0.3), "seen": _mask(z, device, 0.5), "at": torch.zeros_like(rows["cut"])}
    scored = rows["active"] & rows["masked"]
    counts = scored.sum(1)
    passed = Pass(rows["active"], scored, scored & _mask(z, device, 0.8), torch.full_like(counts, count), counts)
    passed = passed._replace(starts=counts.cumsum(0) - counts)
    if rule == "near":
        # Every row has a bound of its own, one of them that of `BOUNDS`.
        passed = passed._replace(bound=-0.1 * (1 + torch.arange(z.batch, device=device)).float())
    confidence = (torch.randint(1, 17, (2, *size)) / 16).log().to(device, dtype)
    entropy = torch.rand(size).to(device) if rule in ENTROPY_RULES else None
    choice = Chosen(torch.randint(TOKENS, size).to(device), *confidence, entropy)
    given = {"table": rows["table"], **passed._asdict(), **choice._asdict()}
    inputs |= {name: value for name, value in given.items() if value is not None}
    if ends is not None:
        inputs["ends"] = torch.tensor(ends).to(device)
    written = tuple(name for name in State._fields if name != "rank")

    def run(x: Inputs) -> tuple[Tensor, ...]:
        state, passed, choice = (kind(*(x.get(name) for name in kind._fields)) for kind in (State, Pass, Chosen))
        kernels.advance_(state, x["table"], passed, choice, Rules(x.get("ends"), 0, rule, **BOUNDS[rule], **how))
        return tuple(x[name] for name in written)

    # Of the table a line a row is read, and becomes `now`. Written: three masks, `now`, `at`; the rest is little.
    read = [x for name, x in inputs.items() if name not in ("fresh", "table")]
    return Case(
        "advance_",
        _sizes(z),
        inputs,
        run,
        bytes=nbytes(*read, *(inputs[name] for name in ("masked", "fresh", "seen", "now", "now", "at"))),
        written=written,
    )
