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
    generation share one pool of memory; they go with it. Where a step cannot be captured, all are taken as they come.

    Args:
        engine: whose state is written in place, and whose rows are filled up alike.
    """

    def __init__(self, engine: "Engine"):
        self.engine, device = engine, engine.rows.tokens.device
        self._on_device = torch.cuda.device(device if device.type == "cuda" else -1)
        self._stream: Any = None
        self.forget()

    def forget(self) -> None:
        """Drop the graphs, as the tensors of the state are others; their memory goes with them."""
        self._pool: Any = None
        self._met: Counter[Shape] = Counter()
        self._graphs: dict[Shape, tuple[Any, torch.Tensor]] = {}
        # What graphs read and nothing else may keep alive: scratch memory and rotary tables are replaced as they grow.
        self._held: list[Any] = []

    def advance(self, shape: Shape) -> StepResult | None:
        """As `Engine.advance`; None where the step was replayed."""
        engine = self.engine
        self._met[shape] += 1
        if self._met[shape] == 1:
            return engine.advance(shape)
        if shape not in self._graphs:
            try:
                graph = self.capture(shape)
            except RuntimeError as error:
                # Nothing of the step has run.
                engine.runner, engine.stats.eager_reason = None, f"a step could not be captured: {error}"
                return engine.advance(shape)
            self._graphs[shape] = graph, engine.report
            self._held.append((engine.workspace.memory(), engine.model.rope_tables(0)))
        graph, engine.report = self._graphs[shape]
        with self._on_device:
            graph.replay()
        engine.stats.replayed_passes += 1
        return None

    def capture(self, shape: Shape) -> Any:
        """A step as a graph; it has not run.

        Raises:
            RuntimeError: CUDA refuses something in it, or memory is short.
        """
        with self._on_device:
            # One stream for all captures, as the libraries keep scratch memory for each that they meet.
            graph, stream = torch.cuda.CUDAGraph(), self._stream or torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # Other threads may allocate: they are not captured.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    self.engine.advance(shape)
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)
        self._pool, self._stream = graph.pool(), stream
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
