"""Steps replayed from CUDA graphs: one launch and one small read where a step has a thousand launches."""

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from dkv.engine.stages import Shape, StepResult

if TYPE_CHECKING:
    from dkv.engine.engine import Engine


class GraphRunner:
    """Takes the steps of an engine, from the third one of a shape on by replaying a graph.

    The first step of a shape compiles kernels and allocates memory, and the second one is captured. All graphs of a
    generation share one pool of memory; they go with it.

    Args:
        engine: whose state is written in place, and whose rows are filled up alike.
    """

    def __init__(self, engine: "Engine"):
        self.engine = engine
        self._pool: Any = None
        self.forget()

    def forget(self) -> None:
        """Drop the graphs, as the tensors of the state are others."""
        self._met: Counter[Shape] = Counter()
        self._graphs: dict[Shape, tuple[Any, torch.Tensor]] = {}

    def advance(self, shape: Shape) -> StepResult | None:
        """As `Engine.advance`; None where the step was replayed."""
        engine = self.engine
        self._met[shape] += 1
        if self._met[shape] == 1:
            return engine.advance(shape)
        if shape not in self._graphs:
            graph = self.capture(shape)
            self._graphs[shape] = graph, engine.report
        graph, engine.report = self._graphs[shape]
        graph.replay()
        engine.stats.replayed_passes += 1
        return None

    def capture(self, shape: Shape) -> Any:
        """A step as a graph; it has not run."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self.engine.advance(shape)
        self._pool = graph.pool()
        return graph


# By the kind of device.
RUNNERS: dict[str, type[GraphRunner]] = {"cuda": GraphRunner}


def runner_of(engine: "Engine") -> GraphRunner | None:
    """What replays the steps of an engine; None where each is taken as it comes. `stats.eager_reason` says why."""
    kind = engine.rows.tokens.device.type
    reasons = {
        f"no graphs on a device of kind {kind}": kind not in RUNNERS,
        "DKV_GRAPHS=0": os.environ.get("DKV_GRAPHS") == "0",
        "records or a hook look into every step": bool(engine.hooks),
        "a logits processor is Python": engine.sampler.processor is not None,
        "stopping criteria are Python": engine.ending is not None and engine.ending.criteria is not None,
        "how many slots the policy computes depends on confidence or chance": engine.planner.reads,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    engine.stats.eager_reason = reason
    return None if reason else RUNNERS[kind](engine)
