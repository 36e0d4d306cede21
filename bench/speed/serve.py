"""What it costs to serve requests that come and go, and what it wins over static batches."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import dkv
from dkv.bench import report
from dkv.bench.contenders import of_lineup
from dkv.bench.options import TINY, Options
from dkv.bench.speed.arrivals import Answered, Ask, Served, at_rate, drawn, summary
from dkv.bench.speed.over_http import over_http
from dkv.bench.timing import in_turn, timed
from dkv.common.bar import Bar
from dkv.tools.text import end_ids

# Shares of the capacity at which requests arrive: what `dkv.LLM` answers in a second, with as many rows as a static
# batch has, if all wait at once.
LOADS = (0.5, 0.8, 0.95)
# The load at which a server is asked over HTTP.
HTTP = 0.5
# Rows of a second `dkv.LLM`, by those of a static batch: it has more memory.
WIDER = 4
# About how long the requests of a run keep an `LLM` busy, and how many they are at least and at most.
SECONDS, FEWEST, MOST = 12.0, 64, 256
# By the way that the capacity is told of, and the one it is compared with.
OURS, STATIC, WIDE = "LLM", "static", "LLM, more rows"


def measure(options: Options) -> dict[str, Any]:
    """Serve seeded requests of ragged lengths, with every policy in `options.served`.

    Prompts and answers are as long as the options say at most, and `batch` rows are served at a time. All ways give
    the same tokens, which is checked. With the bundled "tiny" a server is asked over HTTP, too, where there is one.

    Returns:
        overhead: by policy and kind of rows, the seconds of `dkv.generate` and of `LLM.generate` with the rows of a
            batch, medians, and their `ratio`, the median of those within a round.
        rows: by policy, load and way, what `dkv.bench.speed.arrivals.summary` tells; `load` None: all wait at once.
        requests: of each of these runs, by policy.

    Raises:
        RuntimeError: two ways give different tokens.
    """
    found: dict[str, Any] = {"overhead": [], "rows": [], "requests": {}}
    http = options.name == TINY and all(find_spec(name) is not None for name in ("httpx", "fastapi", "uvicorn"))
    runs = len(options.served) * (4 * (options.rounds + 1) + 3 * (1 + len(LOADS)) + 1 + 2 * http)
    with Bar(runs, "run", pause=0) as bar:
        for policy in options.served:
            served = Served(options.model, options.batch, options.prompt + options.new, of_lineup(policy).settings)
            found["overhead"] += _overhead(options, policy, served, bar)
            rows, asks = _loads(options, policy, served, bar)
            if http:
                rows += _over_http(options, policy, served, asks, HTTP * rows[0]["requests_per_second"], bar)
            found["rows"] += rows
            found["requests"][policy] = len(asks)
    return found


def _overhead(options: Options, policy: str, served: Served, bar: Bar) -> list[dict[str, Any]]:
    """The rows of one batch, of equal and of ragged lengths, by `dkv.generate` and by `LLM.generate`."""
    ragged, device = drawn(options, options.batch), options.model.device
    equal = [Ask(x.number, prompt, options.new) for x, prompt in zip(ragged, options.prompts().tolist(), strict=True)]
    llm, found = served.llm(), []

    def by_llm(asks: Sequence[Ask]) -> list[list[int]]:
        own = [{"max_new_tokens": ask.new, "seed": ask.number} for ask in asks]
        requests = llm.generate([ask.prompt for ask in asks], own=own, progress=False)
        return [request.tokens.tolist() for request in requests]

    for kind, asks in (("equal", equal), ("ragged", ragged)):
        ways = {"generate": partial(served.at_once, asks), OURS: partial(by_llm, asks)}
        calls = {way: partial(timed, call, device) for way, call in ways.items()}
        # The first round is not timed.
        runs = in_turn(calls, options.rounds + 1, bar, lambda number, way, kind=kind: f"{policy}, {kind}, {way}")
        _check_same(*([run[1] for run in own] for own in runs.values()))
        seconds = {way: [run[0] for run in own[1:]] for way, own in runs.items()}
        ratios = [ours / alone for alone, ours in zip(*seconds.values(), strict=True)]
        medians = {way: statistics.median(own) for way, own in seconds.items()}
        row = {"policy": policy, "kind": kind, "batch": len(asks), "tokens": sum(ask.new for ask in asks)}
        row |= {"seconds": medians["generate"], "llm_seconds": medians[OURS]}
        found.append(row | {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)})
    return found


def _loads(options: Options, policy: str, served: Served, bar: Bar) -> tuple[list[dict[str, Any]], list[Ask]]:
    """What is served at every load, and the requests of each of these runs."""
    wide = replace(served, rows=WIDER * served.rows)
    ways = {OURS: (served, served.continuous), STATIC: (served, served.static), WIDE: (wide, wide.continuous)}
    bar.set_description(f"{policy}, how fast it is")
    trial = summary(served.continuous(at_rate(drawn(options, FEWEST // 2), math.inf)))["requests_per_second"]
    bar.update()
    asks, rows = drawn(options, min(max(round(trial * SECONDS), FEWEST), MOST)), []
    for load in (None, *LOADS):
        # What comes first, all at once, tells the rate of the others.
        rate = math.inf if load is None else load * rows[0]["requests_per_second"]
        calls = {way: partial(call, at_rate(asks, rate)) for way, (_, call) in ways.items()}
        name = _percent(load)
        runs = in_turn(calls, 1, bar, lambda _, way, name=name: f"{policy}, {name}, {way}")
        _check_same(*(_tokens(own) for (own,) in runs.values()))
        for way, (own,) in runs.items():
            rows.append(_row(policy, way, ways[way][0], load, rate, own))
    return rows, asks


def _over_http(
    options: Options, policy: str, served: Served, asks: Sequence[Ask], rate: float, bar: Bar
) -> list[dict[str, Any]]:
    """The same requests, which end at an end token, by `dkv.LLM` in this process and by a server."""
    tokenizer = dkv.load_tokenizer(options.name)
    ended = replace(served, settings={**served.settings, "eos_token_id": end_ids(tokenizer, options.model.spec)})
    ways = {f"{OURS}, to an end": ended.continuous, "dkv serve": partial(over_http, options.name, tokenizer, ended)}
    calls = {way: partial(call, at_rate(asks, rate)) for way, call in ways.items()}
    runs = in_turn(calls, 1, bar, lambda _, way: f"{policy}, {way}")
    _check_same(*(_tokens(own) for (own,) in runs.values()))
    return [_row(policy, way, served, HTTP, rate, own) for way, (own,) in runs.items()]


def _row(policy: str, way: str, served: Served, load: float | None, rate: float, own: list[Answered]) -> dict[str, Any]:
    facts = {"policy": policy, "way": way, "rows": served.rows, "load": load}
    return {**facts, "rate": None if load is None else rate, **summary(own)}


def _tokens(answers: Sequence[Answered]) -> dict[int, list[int]]:
    return {answer.ask.number: answer.tokens for answer in answers}


def _check_same(*found: Any) -> None:
    if any(other != found[0] for other in found[1:]):
        raise RuntimeError("two ways to serve the same requests gave different tokens: the figures compare nothing")


def _percent(load: float | None) -> str:
    return "all at once" if load is None else f"{load:.0%}"


def _ms(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: " / ".join(f"{1e3 * row[f'{name}_{share}']:,.0f}" for share in ("p50", "p99"))


OVERHEAD = {
    "policy": "{policy}",
    "rows": "{batch} {kind}",
    "generate s": "{seconds:.2f}",
    "LLM s": "{llm_seconds:.2f}",
    "LLM / generate": "{ratio:.3f}",
    "of rounds": "{low:.3f} to {high:.3f}",
}
CELLS = {
    "policy": "{policy}",
    "load": lambda row: _percent(row["load"]),
    "way": "{way}",
    "rows": "{rows}",
    "asked/s": "{rate:.2f}",
    "served/s": "{requests_per_second:.2f}",
    "tokens/s": "{tokens_per_second:,.0f}",
    "first ms": _ms("first"),
    "ms/token": _ms("per_token"),
    "whole ms": _ms("whole"),
}


def table(found: dict[str, Any]) -> str:
    """The figures of `measure` for a terminal."""
    legend = (
        "Times are p50 / p99. first: from the arrival of a request to its first token that stays; ms/token: from its\n"
        f"arrival to its end, by its tokens. {STATIC}: those that wait, as many as there are rows, are a batch of\n"
        "dkv.generate, answered when all of it is done; nothing is computed of rows that are. Load: of what LLM\n"
        "serves with as many rows if all wait at once. Arrivals are Poisson, the same for all ways; idle time is left\n"
        "out, but for dkv serve, whose clients ask over HTTP in real time and share the processor with it."
    )
    counts = ", ".join(f"{policy}: {count}" for policy, count in found["requests"].items())
    lines = ["the rows of one batch, served at once", report.table(found["overhead"], OVERHEAD, left=2), ""]
    lines += [f"requests that arrive at random ({counts} in a run)", report.table(found["rows"], CELLS, left=3)]
    return "\n".join([*lines, "", *verdict(found["rows"]), "", legend])


def verdict(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What rows that are joined win over static batches, in words."""
    said, told = [], {(row["policy"], row["load"], row["way"]): row for row in rows}
    for (policy, load, way), row in told.items():
        if way == OURS:
            static = told[policy, load, STATIC]
            more = f"{row['requests_per_second'] / static['requests_per_second']:.2f}x the requests per second"
            names = {"first": "to the first token", "per_token": "per token", "whole": "in all"}
            less = (
                f"{words} {row[f'{name}_p50'] / static[f'{name}_p50']:.2f} / "
                f"{row[f'{name}_p99'] / static[f'{name}_p99']:.2f}"
                for name, words in names.items()
            )
            said.append(f"{policy}, {_percent(load)}: {more} of static batches; times {', '.join(less)} of theirs.")
    return said
