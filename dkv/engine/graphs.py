"""Steps replayed from CUDA graphs: one launch and one small read where a step has a thousand launches."""

import os
import threading
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from dkv.engine.stages import Shape, StepResult
from dkv.kernels.common import backend

if TYPE_CHECKING:
    from dkv.engine.engine import Engine


# PyTorch knows one capture at a time in a process.
_capturing = threading.Lock()


class GraphRunner:
    """Takes the steps of an engine: the first of a shape as it comes, all others by replaying a graph.

    The first step of a shape compiles kernels and allocates memory; at the second one the step is captured. All graphs
    of a generation share one pool of memory; they go with it. Where a step cannot be captured, it and those that follow
    are taken as they come.

    Args:
        engine: whose state is written in place, and whose rows are filled up alike.
    """

    def __init__(self, engine: "Engine"):
        # The engine holds the runner: without a cycle both go, and their memory with them, when it is dropped.
        self.engine, device = weakref.proxy(engine), engine.rows.tokens.device
        self._on_device = torch.cuda.device(device if device.type == "cuda" else -1)
        self._stream: Any = None
        self.forget()

    def forget(self) -> None:
        """Drop the graphs, as the tensors of the state are others; their memory goes with them."""
        self._pool: Any = None
        self._met: Counter[Shape] = Counter()
        self._graphs: dict[Shape, tuple[Any, torch.Tensor]] = {}
        # What graphs read and nothing else may keep alive: scratch memory and rotary tables are replaced as they grow,
        # and weights where the model is moved.
        self._held: list[Any] = []

    def advance(self, shape: Shape) -> StepResult | None:
        """As `Engine.advance`; None where the step was replayed."""
        engine = self.engine
        self._met[shape] += 1
        if self._met[shape] == 1:
            return engine.advance(shape)
        if shape not in self._graphs and (error := self._add(shape)):
            # Nothing of the step has run on the device.
            self.forget()
            engine.runner, engine.stats.eager_reason = None, f"a step could not be captured: {error}"
            return engine.advance(shape)
        graph, engine.report = self._graphs[shape]
        with self._on_device:
            graph.replay()
        engine.stats.replayed_passes += 1
        return None

    def _add(self, shape: Shape) -> str:
        """Capture the step of a shape; returns why it cannot be, or nothing."""
        engine = self.engine
        read = (*engine.workspace.memory(), *engine.model.rope_tables(0), *engine.model.parameters())
        try:
            with _capturing:
                graph = self.capture(shape)
        except RuntimeError as error:
            return str(error)
        self._graphs[shape] = graph, engine.report
        self._held.append((*read, *engine.workspace.memory()))
        return ""

    def capture(self, shape: Shape) -> Any:
        """A step as a graph; it has not run.

        Raises:
            RuntimeError: CUDA refuses something in it, or memory is short.
        """
        with self._on_device:
            if self._stream is None:
                # One for all captures, as the libraries keep scratch memory for each stream that they meet.
                self._stream = torch.cuda.Stream()
                # Cached memory is not given back while a capture asks for more.
                torch.cuda.empty_cache()
            graph, stream = torch.cuda.CUDAGraph(), self._stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # Other threads may allocate: they are not captured.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    self.engine.advance(shape)
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)
        self._pool = graph.pool()
        return graph


# By the kind of device.
RUNNERS: dict[str, type[GraphRunner]] = {"cuda": GraphRunner}


# Entries that rows of different lengths are filled up to, as a multiple of those that they have: graphs save launches,
# and beyond this the additional work is taken to cost more. Not timed.
MOST_FILLED = 1.5


def _is_hooked(model: Any) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def runner_of(engine: "Engine") -> GraphRunner | None:
    """What replays the steps of an engine; None where each is taken as it comes. `stats.eager_reason` says why."""
    rows, lengths = engine.rows, engine.rows.row_lengths
    kind = rows.tokens.device.type
    if kind not in RUNNERS:
        engine.stats.eager_reason = f"no graphs on a device of kind {kind}"
        return None
    reasons = {
        "DKV_GRAPHS=0": os.environ.get("DKV_GRAPHS") == "0",
        "records or a hook look into every step": bool(engine.hooks),
        "a logits processor is Python": engine.sampler.processor is not None,
        "stopping criteria are Python": engine.ending is not None and engine.ending.criteria is not None,
        "how many slots the policy computes depends on confidence or chance": engine.planner.reads,
        "the reference backend reads values": backend.chosen() == "reference",
        "hooks on modules of the model are Python": _is_hooked(engine.model),
        "rows differ much in length, and filled up alike they would cost more": rows.size * len(lengths)
        > MOST_FILLED * sum(lengths),
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    engine.stats.eager_reason = reason
    return None if reason else RUNNERS[kind](engine)
