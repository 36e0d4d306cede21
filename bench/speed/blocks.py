"""The block policies and parallel decoding, against eager PyTorch and against the products alone."""

import statistics
from functools import partial
from typing import Any

import torch

import dkv
from dkv.bench import report
from dkv.bench.baselines import fast_dllm
from dkv.bench.contenders import of_lineup
from dkv.bench.lineup import RULES
from dkv.bench.options import Options
from dkv.bench.speed import floor
from dkv.bench.steps import HalfWay
from dkv.bench.timing import in_turn, timed
from dkv.common.bar import Bar

BLOCK = 32
# Those that the published code has, on models of its family.
PUBLISHED = ("plain", "prefix", "dual", "suffix 96")
FLOOR_ROUNDS = 9


def measure(options: Options) -> dict[str, Any]:
    """Every policy with every rule, one prompt at a time, in turn with the eager baseline.

    Returns:
        {"rows": [...]}: `passes`, `tokens_per_forward`, `seconds` and `eager_seconds` (medians), `speed` against
        dkv's plain decoding and `over_eager` (medians of ratios within a round), `same`: whether the tokens are those
        of the baseline; and `step_over_floor`: a cached step half-way, against its matrix products.

    Raises:
        ValueError: more than one row, or slots that do not make whole blocks.
    """
    if options.batch != 1:
        raise ValueError(f"batch must be 1, as the published block policies take one prompt, got {options.batch}")
    if options.new % BLOCK:
        raise ValueError(f"new must be a multiple of {BLOCK}, the slots of a block, got {options.new}")
    family = options.eager is not None and not options.model.spec.shifted
    contenders = [(policy, rule) for rule in options.rules for policy in options.blocked]
    calls = {key: partial(_both, options, *key, family and key[0] in PUBLISHED) for key in contenders}
    with Bar(len(calls) * (options.rounds + 1), "run", pause=0) as bar:
        # The first round is not timed, but looked at.
        first, runs = in_turn(calls, 1, bar), in_turn(calls, options.rounds, bar)
    rows = []
    for policy, rule in contenders:
        (_, _, facts), own = first[policy, rule][0], runs[policy, rule]
        seconds, eager = [run[0] for run in own], [run[1] for run in own if run[1] is not None]
        plain = [run[0] for run in runs["plain", rule]]
        row = {"policy": policy, "rule": rule, **facts, "seconds": statistics.median(seconds)}
        row["eager_seconds"] = statistics.median(eager) if eager else None
        row |= {"speed": _ratio(plain, seconds), "over_eager": _ratio(eager, seconds) if eager else None}
        row["step_over_floor"] = _over_floor(options, policy) if rule == "one a step" else None
        rows.append(row)
    return {"rows": rows}


def _ratio(of: list[float], over: list[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(of, over, strict=True))


def _both(options: Options, policy: str, rule: str, baseline: bool) -> tuple[float, float | None, dict[str, Any]]:
    """Seconds of dkv and of the baseline, and what they did."""
    ids, call = options.prompts(), {"block_length": BLOCK, **of_lineup(policy).settings, **RULES[rule]}
    settings, eager, same = {"max_new_tokens": options.new, "schedule": "blocks", **call}, None, None
    seconds, output = timed(lambda: dkv.generate(options.model, ids, **settings), options.model.device)
    if baseline:
        run = partial(fast_dllm.generate, options.eager, ids, new=options.new, **call)
        eager, (tokens, _) = timed(run, options.model.device)
        same = torch.equal(tokens, output.sequences)
    facts = {name: getattr(output.stats, name) for name in ("passes", "tokens_per_forward", "computed_share")}
    return seconds, eager, facts | {"same": same}


def _over_floor(options: Options, policy: str) -> float:
    """A cached step half-way (of plain decoding, a full one) against its products, medians of ratios within a round."""
    half_way = HalfWay(options, {**of_lineup(policy).settings, "block_length": BLOCK}, cached=True)
    alone = floor.products(options.model, half_way)

    def ratio() -> float:
        products = sum(floor.seconds_of(alone, options.model.device).values())
        return half_way.seconds() / products

    # The first is not timed.
    return statistics.median(in_turn({policy: ratio}, FLOOR_ROUNDS)[policy][1:])


CELLS = {
    "policy": "{policy}",
    "rule": "{rule}",
    "passes": "{passes}",
    "tokens/pass": "{tokens_per_forward:.2f}",
    "computed": "{computed_share:.0%}",
    "s": "{seconds:.3f}",
    "speed": "{speed:.2f}x",
    "eager s": "{eager_seconds:.3f}",
    "over eager": "{over_eager:.2f}x",
    "same": lambda row: {None: "", True: "yes", False: "NO"}[row["same"]],
    "step/floor": "{step_over_floor:.2f}",
}


def table(found: dict[str, Any]) -> str:
    """A line per policy and rule."""
    legend = (
        f"Blocks of {BLOCK} slots. speed: against plain with the same rule. over eager: against the same policy in\n"
        "eager PyTorch; same: its tokens are the same. step/floor: a cached step against its matrix products."
    )
    return f"{report.table(found['rows'], CELLS, left=2)}\n\n{legend}"
