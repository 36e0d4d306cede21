"""Parts `steps` and `more`: whole generations of models of random weights, by policy and by what computes them."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dkv
from dkv import kernels
from dkv.bench.baselines import dkv_cache as published
from dkv.bench.baselines import operations as eager
from dkv.bench.baselines.forward import Attend
from dkv.bench.contenders import of_lineup
from dkv.bench.gpu.lab import TITLES, Lab
from dkv.bench.gpu.report import Report
from dkv.bench.gpu.tools import variable
from dkv.bench.lineup import PLAIN
from dkv.bench.report import fixed
from dkv.bench.timing import in_turn, timed
from dkv.models import Transformer
from dkv.models.weight_only import BITS

DECODE = "decode 8"
# What computes a generation: the kernels in replayed steps; the kernels, each step launched as it comes; PyTorch; and
# the published method, whose norms and caches are eager, with this or that attention.
REPLAYED, STEPWISE, TORCH, PUBLISHED, EAGER, FLEX = (
    *("triton", "stepwise", "torch", "published"),
    *("published, eager attention", "published, flex"),
)
# Replayed as well, with weights of fewer bits.
FEWER_BITS = {f"{bits} weights": bits for bits in BITS}
# (policy, computed by), what decides most first. Those that decide take turns.
DECIDING = ((PLAIN, REPLAYED), (DECODE, REPLAYED))
ROUNDED = tuple((DECODE, way) for way in FEWER_BITS)
OTHERS = (
    (DECODE, PUBLISHED),
    (PLAIN, PUBLISHED),
    (DECODE, STEPWISE),
    (PLAIN, TORCH),
    ("prefill", REPLAYED),
    ("greedy 4", REPLAYED),
    (PLAIN, STEPWISE),
    (PLAIN, EAGER),
    (PLAIN, FLEX),
)
# Timed runs of those that decide and of all others, after one that compiles.
ROUNDS, FEWER = 2, 1
# Rows and lengths of part `more`.
BATCH, LENGTHS = 8, 2

COLUMNS = {
    "model, batch, slots, policy": (36, "{name}"),
    "computed by": (26, "{way}"),
    "ms/step": (9, "{ms_per_step:.2f}"),
    "tokens/s": (9, "{tokens_per_second:.1f}"),
    "to plain": (9, "{ratio_to_plain:.2f}x"),
    "computed": (9, "{computed_share:.0%}"),
    "peak GB": (8, "{peak_gb:.2f}"),
    "replayed": (9, "{replayed_passes}"),
    "": (0, lambda values: "" if values["warm"] else "  first run, compilation included"),
}


@dataclass(frozen=True)
class Bench:
    """Generations of one model, of so many rows and slots.

    Attributes:
        model: makes it, with joined products, of weights of this kind ("" or a key of `BITS`); plain_model: the same
            weights, one product each, for the published code.
    """

    lab: Lab
    family: str
    batch: int
    slots: int
    model: Callable[[str], Transformer]
    plain_model: Callable[[], Transformer]

    @property
    def name(self) -> str:
        return f"{TITLES[self.family]} B{self.batch} S{self.slots}"

    def run(self, policy: str, way: str) -> dict[str, Any]:
        """A generation: its seconds, passes, tokens, and the most gigabytes that it held."""
        lab, new, settings = self.lab, self.lab.new, of_lineup(policy).settings
        ids = lab.prompts(self.family, self.batch, self.slots - new)
        if way in ATTENTION:
            call = partial(published.generate, self.plain_model(), ids, new=new, attend=ATTENTION[way], **settings)
        else:
            model = self.model(FEWER_BITS.get(way, ""))
            call = partial(dkv.generate, model, ids, max_new_tokens=new, schedule="blocks", seed=0, **settings)
        if lab.gpu:
            torch.cuda.reset_peak_memory_stats(lab.device)
        backend = way if way == TORCH else lab.backends[0]
        with kernels.use_backend(backend), variable("DKV_GRAPHS", str(int(way != STEPWISE))):
            seconds, output = timed(call, lab.device)
        found = {"seconds": seconds, "passes": new, "new_tokens": new * self.batch}
        if isinstance(output, dkv.DiffusionOutput):
            names = ("passes", "full_passes", "replayed_passes", "graph_bytes", "computed_share", "eager_reason")
            found |= {name: getattr(output.stats, name) for name in names}
        return found | {"peak_gb": torch.cuda.max_memory_allocated(lab.device) / 1e9 if lab.gpu else 0.0}


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


# Of the ways that compute as published.
ATTENTION: dict[str, Attend] = {
    PUBLISHED: F.scaled_dot_product_attention,
    EAGER: lambda *heads: eager.attention(*(x.transpose(1, 2) for x in heads)).transpose(1, 2),
    FLEX: lambda *heads: _compiled_flex()(*heads),
}


def _values(runs: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """A result as it is written. The first run compiled and warmed up, and counts only where it is the only one."""
    timed, against = runs[1:] or runs, plain[1:] or plain
    typical = statistics.median(run["seconds"] for run in timed)
    values = {**timed[-1], "runs": len(timed), "warm": len(runs) > 1, "seconds": [run["seconds"] for run in timed]}
    values |= {"ms_per_step": typical / values["passes"] * 1e3, "tokens_per_second": values["new_tokens"] / typical}
    if against:
        values["ratio_to_plain"] = statistics.median(run["seconds"] for run in against) / typical
    return values


def _take_turns(report: Report, bench: Bench, contenders: Sequence[tuple[str, str]], rounds: int, plain: list) -> None:
    """Time and report contenders. `plain` has the runs of plain decoding, and gets them where it is among these."""
    failed, begun = set(), set()

    def attempt(policy: str, way: str) -> dict[str, Any] | None:
        # A first round that was begun is finished.
        if (policy, way) in failed or (report.left <= 0 and (policy, way) in begun):
            return None
        begun.add((policy, way))
        run = report.attempt(f"{bench.name} {policy} by {way}", bench.lab.device, partial(bench.run, policy, way))
        if run is None:
            failed.add((policy, way))
        return run

    tried = in_turn({key: partial(attempt, *key) for key in contenders}, rounds + 1)
    runs = {key: [run for run in found if run is not None] for key, found in tried.items()}
    plain += runs.get((PLAIN, bench.lab.backends[0]), [])
    for (policy, way), found in runs.items():
        if found:
            values = {"name": f"{bench.name} {policy}", "policy": policy, "way": way, **_values(found, plain)}
            report.row(fixed(COLUMNS, values, left=2), values)


def _measure(
    report: Report,
    lab: Lab,
    family: str,
    batch: int,
    lengths: Sequence[int],
    rounds: int,
    deciding: Sequence[tuple[str, str]] = DECIDING,
    others: Sequence[tuple[str, str]] = (),
) -> None:
    """Time the generations of a model: those that decide at all lengths, then the others, while there is time."""
    kernels_ = lab.backends[0]
    model, plain_model = cache(partial(lab.model, family)), cache(lambda: lab.plain_model(family))
    plain: dict[int, list] = {slots: [] for slots in lengths}

    def named() -> Iterator[tuple[str, Callable[[], None]]]:
        for contenders, often in ((deciding, rounds), *(((other,), FEWER) for other in others)):
            for slots in lengths:
                bench = Bench(lab, family, batch, slots, model, plain_model)
                here = [(policy, kernels_ if way == REPLAYED else way) for policy, way in contenders]
                name = f"{bench.name} {' and '.join(policy for policy, _ in here)} by {here[0][1]}"
                yield name, partial(_take_turns, report, bench, here, often, plain[slots])

    for _, call in report.items(named()):
        call()


def run(report: Report, lab: Lab) -> None:
    """Time generations of one row of the first model."""
    family, spec = next(iter(lab.specs.items()))
    report.begin("steps", "whole generations, a token a step; to plain: seconds of plain decoding by the kernels / own")
    print(fixed(COLUMNS, left=2))
    left_out = {TORCH} if lab.backends[0] == TORCH else set()
    left_out |= set() if lab.gpu else {STEPWISE, FLEX}
    # The published code for models whose outputs are shifted is another.
    left_out |= set(ATTENTION) if spec.shifted else set()
    others = [(policy, way) for policy, way in OTHERS if way not in left_out]
    _measure(report, lab, family, 1, lab.slots, ROUNDS, (*DECIDING, *ROUNDED), others)
    report.end()


def run_more(report: Report, lab: Lab) -> None:
    """Time generations of the other model, and of batches."""
    _, *rest = lab.specs
    report.begin("more", "whole generations of the other model and of batches; as in part steps")
    print(fixed(COLUMNS, left=2))
    for family, batch in [*((family, 1) for family in rest), *((family, BATCH) for family in lab.specs)]:
        _measure(report, lab, family, batch, lab.slots[:LENGTHS], FEWER)
    report.end()
