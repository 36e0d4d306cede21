"""Steps replayed from CUDA graphs: one launch and one small read where a step has hundreds of launches."""

import os
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dkv.engine.stages import Shape, StepResult
from dkv.kernels.common import backend
from dkv.parallel import ranks_of

if TYPE_CHECKING:
    from dkv.engine.engine import Engine

# Steps that have to be ahead of a row for a capture, which takes as long as a few of them. Not timed.
LEAST_AHEAD = 8
# Graphs of a runner, and runners that are kept for the next generations with a model, with their keys and values.
MOST_GRAPHS, MOST_KEPT = 32, 2
# PyTorch knows one capture at a time in a process.
_capturing = threading.Lock()
_choosing = threading.Lock()
# By device and stream, the one that captures for it: libraries keep scratch memory for each stream that they meet.
_streams: dict[tuple[int, int], Any] = {}
# By model: a runner is free once its keys and values are.
_kept: "weakref.WeakKeyDictionary[Any, list[GraphRunner]]" = weakref.WeakKeyDictionary()


class GraphRunner:
    """Takes the steps of an engine: the first of a shape as it comes, all others by replaying a graph.

    The first step of a shape compiles kernels and allocates memory; at the second one the step is captured. All graphs
    share one pool of memory. Where a step cannot be captured, it and those that follow are taken as they come.

    A graph reads and writes the tensors that it was captured with. So the runner keeps these, and another generation
    of the same settings and sizes, whose state it copies into them, begins with the graphs of the last one.

    Args:
        engine: whose state is written in place.
    """

    def __init__(self, engine: "Engine"):
        device = engine.rows.tokens.device
        # A graph writes where it was captured, so nothing grows.
        engine.cache.reserve(engine.cache.length)
        self._on_device = torch.cuda.device(device if device.type == "cuda" else -1)
        self._pool: Any = None
        self._met: set[Shape] = set()
        self._graphs: dict[Shape, Any] = {}
        # What graphs read and nothing else may keep alive: scratch memory and rotary tables are replaced as they grow,
        # and weights where the model is moved.
        self._held: list[Any] = []
        self.nbytes = 0
        self.key = key_of(engine)
        self._state = {name: value for _, name, value in state_of(engine)}
        self._layers, self._plan = engine.cache.layers, None
        self._workspace, self._made = engine.workspace, engine.sampler.made
        self._serve(engine)

    def _serve(self, engine: "Engine") -> None:
        # The engine holds the runner: without a cycle it goes when it is dropped.
        self.engine, self._owner = weakref.proxy(engine), weakref.ref(engine.cache)

    @property
    def free(self) -> bool:
        """Whether nobody holds the keys and values: neither a generation nor its output."""
        return self._owner() is None

    def adopt(self, engine: "Engine") -> None:
        """Take over the state of another generation that has the same key; from now on it lives in the tensors here."""
        engine.cache.reserve(engine.cache.length)
        for holder, name, value in list(state_of(engine)):
            attribute = name.rpartition(".")[2]
            setattr(holder, attribute, self._state[name].copy_(value))
        engine.cache.layers, engine.next_plan = self._layers, self._plan
        engine.workspace = engine.sampler.workspace = self._workspace
        engine.sampler.made = self._made
        self._serve(engine)

    def advance(self, shape: Shape) -> StepResult | None:
        """As `Engine.advance`; None where the step was replayed."""
        engine = self.engine
        self._plan = engine.next_plan
        if shape not in self._graphs:
            if shape not in self._met or not self._pays():
                result = engine.advance(shape)
                self._met.add(shape)
                return result
            if error := self._add(shape):
                # Nothing of the step has run on the device.
                drop(self)
                engine.runner, engine.stats.eager_reason = None, f"a step could not be captured: {error}"
                return engine.advance(shape)
        with self._on_device:
            self._graphs[shape].replay()
        engine.stats.replayed_passes += 1
        return None

    def _pays(self) -> bool:
        """Whether a new graph would be replayed often enough."""
        return len(self._graphs) < MOST_GRAPHS and max(self.engine.status.masked) >= LEAST_AHEAD

    def _add(self, shape: Shape) -> str:
        """Capture the step of a shape; returns why it cannot be, or nothing."""
        engine = self.engine
        tables = engine.model.rope_tables(engine.cache.slots)
        read = (*engine.workspace.memory(), *tables, *weights_of(engine.model))
        before = self._reserved()
        try:
            with _capturing:
                graph = self.capture(shape)
        except RuntimeError as error:
            # The end of a capture that has failed tells of that alone.
            return str(error.__context__ or error)
        self._graphs[shape] = graph
        self._held.append((*read, *engine.workspace.memory()))
        self.nbytes += self._reserved() - before
        engine.stats.graphs, engine.stats.graph_bytes = len(self._graphs), self.nbytes
        return ""

    def _reserved(self) -> int:
        with self._on_device:
            return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0

    def capture(self, shape: Shape) -> Any:
        """A step as a graph; it has not run.

        Raises:
            RuntimeError: CUDA refuses something in it, or memory is short.
        """
        with self._on_device:
            current = torch.cuda.current_stream()
            key = current.device_index, current.cuda_stream
            if key not in _streams:
                _streams[key] = torch.cuda.Stream()
            if self._pool is None:
                # Cached memory is not given back while a capture asks for more.
                torch.cuda.empty_cache()
            graph, stream = torch.cuda.CUDAGraph(), _streams[key]
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                # Made now, if this thread has had no product yet: a capture cannot.
                torch.cuda.current_blas_handle()
                # Other threads may allocate: they are not captured.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    self.engine.advance(shape)
                finally:
                    graph.capture_end()
            current.wait_stream(stream)
        self._pool = graph.pool()
        return graph


# By the kind of device.
RUNNERS: dict[str, type[GraphRunner]] = {"cuda": GraphRunner}


def runner_of(engine: "Engine", kept: bool) -> GraphRunner | None:
    """What replays the steps of an engine; None where each is taken as it comes. `stats.eager_reason` says why.

    Args:
        kept: it may be one of an earlier generation, and serve later ones; else its keys and values are its own.
    """
    kind = engine.rows.tokens.device.type
    if kind not in RUNNERS:
        engine.stats.eager_reason = f"no graphs on a device of kind {kind}"
        return None
    reasons = {
        "DKV_GRAPHS=0": os.environ.get("DKV_GRAPHS") == "0",
        "records or a hook look into every step": bool(engine.hooks),
        "a logits processor is Python": engine.sampler.processor is not None,
        "stopping criteria are Python": engine.ending is not None and engine.ending.asked,
        "the reference backend reads values": backend.chosen() == "reference",
        "several processes share the model": ranks_of(engine.model) is not None,
        "hooks on modules of the model are Python": _is_hooked(engine.model),
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    engine.stats.eager_reason = reason
    if reason:
        return None
    with _choosing:
        return (_kept_runner(engine) or _new_runner(engine, RUNNERS[kind])) if kept else RUNNERS[kind](engine)


def _is_hooked(model: Any) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _kept_runner(engine: "Engine") -> GraphRunner | None:
    """A free runner of an earlier generation of this kind, which takes over the state of this one."""
    key = key_of(engine)
    for runner in _kept.get(engine.model, ()):
        if runner.free and runner.key == key:
            runner.adopt(engine)
            return runner
    return None


def _new_runner(engine: "Engine", kind: type[GraphRunner]) -> GraphRunner:
    """A runner that will be kept, in place of those that are too many: free ones first, then the oldest. One that is
    at work goes with its generation."""
    kept = sorted(_kept.get(engine.model, ()), key=lambda runner: not runner.free)
    runner = kind(engine)
    _kept[engine.model] = [*kept[max(len(kept) - MOST_KEPT + 1, 0) :], runner]
    return runner


def drop(runner: GraphRunner) -> None:
    """Do not keep a runner."""
    with _choosing:
        for runners in list(_kept.values()):
            if runner in runners:
                runners.remove(runner)


def release_graphs(model: Any) -> None:
    """Free the graphs that are kept for the next generations with a model, and the keys and values with them.

    Graphs of generations that go on, and keys and values that an output holds, stay.
    """
    with _choosing:
        _kept.pop(model, None)


def state_of(engine: "Engine") -> Iterator[tuple[Any, str, Tensor]]:
    """The tensors that outlive a step and are not keys and values: who holds them, their name, and the tensor."""
    rows = engine.rows
    holders = {
        "engine": engine,
        "rows": rows,
        "timetable": rows.timetable,
        "planner": engine.planner,
        "blocks": engine.blocks,
        "editing": engine.editing,
        "watch": engine.watch,
        "near": engine.planner.near,
        "certainty": engine.planner.certainty,
        "narrowing": engine.narrowing,
        "noise": engine.noise,
        "ending": engine.ending,
    }
    for prefix, holder in holders.items():
        for name, value in vars(holder).items() if holder is not None else ():
            if isinstance(value, Tensor) and f"{prefix}.{name}" not in ("rows.ids", "rows._slot"):
                yield holder, f"{prefix}.{name}", value


def weights_of(model: Any) -> Iterator[Tensor]:
    """The memory of all weights, as a parameter takes other memory where its model is moved; of those that torchao has
    quantised that of their parts.
    """
    for weight in (*model.parameters(), *model.buffers()):
        names = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else None
        yield from [weight.detach()] if names is None else (getattr(weight, name) for name in names)


def key_of(engine: "Engine") -> Any:
    """What has to be equal for the graphs of one generation to be those of another."""
    device = engine.rows.tokens.device
    settings = {name: value for name, value in engine.config.settings().items() if name != "seed"}
    return (
        {name: (value.shape, value.dtype, value.stride()) for _, name, value in state_of(engine)},
        repr(settings),
        (engine.mask_id, engine.pad_id, engine.planner.most, type(engine.noise), type(engine.config.cache)),
        (backend.chosen(), os.environ.get("DKV_BATCH_INVARIANT"), torch.is_inference_mode_enabled()),
        # Another stream may not have seen what was written.
        torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0,
        (torch.is_autocast_enabled(), torch.get_float32_matmul_precision()),
        tuple((x.data_ptr(), x.dtype) for x in weights_of(engine.model)),
    )
