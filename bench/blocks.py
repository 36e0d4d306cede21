"""The block policies (Fast-dLLM) and parallel decoding, against eager PyTorch and against the products alone."""

import statistics
from typing import Any

import torch

import dkv
from dkv.bench import fastdllm, floor
from dkv.bench.options import Options
from dkv.bench.report import columns
from dkv.bench.steps import HalfWay, timed
from dkv.common.bar import Bar

BLOCK = 32
POLICIES = {
    "plain": dkv.NoCache(), "prefix": dkv.PrefixCache(), "dual": dkv.DualCache(),
    "prefix delayed": dkv.PrefixCache(delayed=True), "dual delayed": dkv.DualCache(delayed=True),
}  # fmt: skip
RULES: dict[str, dict[str, Any]] = {"one a step": {}, "threshold 0.9": {"threshold": 0.9}}
# Those that the published code has, on models of its family.
PUBLISHED = ("plain", "prefix", "dual")
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
    own = options.eager is not None and not options.model.spec.shifted
    contenders = [(policy, rule) for rule in RULES for policy in POLICIES]
    runs: dict[tuple[str, str], list[tuple[float, float | None]]] = {key: [] for key in contenders}
    first: dict[tuple[str, str], dict[str, Any]] = {}
    total = len(contenders) * (options.rounds + 1)
    with Bar(total, "run", pause=0) as bar:
        for number in range(options.rounds + 1):
            for policy, rule in contenders:
                seconds, eager, facts = _both(options, policy, rule, own and policy in PUBLISHED)
                # The first round is not timed, but looked at.
                if number == 0:
                    first[policy, rule] = facts
                else:
                    runs[policy, rule].append((seconds, eager))
                bar.update()
    rows = []
    for policy, rule in contenders:
        own_runs, plain = runs[policy, rule], runs["plain", rule]
        against = [p[0] / r[0] for p, r in zip(plain, own_runs, strict=True)]
        over = [r[1] / r[0] for r in own_runs if r[1] is not None]
        rows.append({
            "policy": policy, "rule": rule, **first[policy, rule], "seconds": statistics.median(r[0] for r in own_runs),
            "eager_seconds": statistics.median(r[1] for r in own_runs) if over else None,
            "speed": statistics.median(against), "over_eager": statistics.median(over) if over else None,
            "step_over_floor": _over_floor(options, policy) if rule == "one a step" else None,
        })  # fmt: skip
    return {"rows": rows}


def _both(options: Options, policy: str, rule: str, baseline: bool) -> tuple[float, float | None, dict[str, Any]]:
    """Seconds of dkv and of the baseline, and what they did."""
    ids, call = options.prompts(), {"block_length": BLOCK, "cache": POLICIES[policy], **RULES[rule]}
    settings = {"max_new_tokens": options.new, "schedule": "blocks", **call}
    seconds, output = timed(lambda: dkv.generate(options.model, ids, **settings), options.model.device)
    eager, same = None, None
    if baseline:
        published = {"new": options.new, **call}
        eager, (tokens, _) = timed(lambda: fastdllm.generate(options.eager, ids, **published), options.model.device)
        same = torch.equal(tokens, output.sequences)
    stats = output.stats
    facts = {"passes": stats.passes, "tokens_per_forward": stats.tokens_per_forward, "same": same}
    return seconds, eager, facts | {"computed_share": stats.computed_share}


def _over_floor(options: Options, policy: str) -> float:
    """A cached step half-way (of plain decoding, a full one) against its products, medians of ratios within a round."""
    model, half_way = options.model, HalfWay(options, {"cache": POLICIES[policy], "block_length": BLOCK}, cached=True)
    forward = half_way.take().forward
    half_way.back()
    sizes = (1, half_way.engine.rows.size, forward.positions.shape[1], forward.hidden.shape[1])
    alone = floor.products(model, *sizes)
    ratios = []
    for _ in range(FLOOR_ROUNDS):
        products = sum(timed(call, model.device)[0] for call in alone.values())
        ratios.append(timed(half_way.take, model.device)[0] / products)
        half_way.back()
    return statistics.median(ratios[1:])


def table(found: dict[str, Any]) -> str:
    """A line per policy and rule."""
    lines = [
        (
            row["policy"], row["rule"], str(row["passes"]), f"{row['tokens_per_forward']:.2f}",
            f"{row['computed_share']:.0%}", f"{row['seconds']:.3f}", f"{row['speed']:.2f}x",
            _or_blank(row["eager_seconds"], "{:.3f}"), _or_blank(row["over_eager"], "{:.2f}x"),
            {None: "", True: "yes", False: "NO"}[row["same"]], _or_blank(row["step_over_floor"], "{:.2f}"),
        )
        for row in found["rows"]
    ]  # fmt: skip
    header = ("policy", "rule", "passes", "tokens/pass", "computed", "s", "speed", "eager s", "over eager", "same",
              "step/floor")  # fmt: skip
    legend = (
        f"Blocks of {BLOCK} slots. speed: against plain with the same rule. over eager: against the same policy in\n"
        "eager PyTorch; same: its tokens are the same. step/floor: a cached step against its matrix products."
    )
    return f"{columns(header, lines, left=2)}\n\n{legend}"


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
