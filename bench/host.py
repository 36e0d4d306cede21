"""What the host does in a step on a GPU, counted on any machine: launches by kind, uploads, waits.

The engine takes its steps on the CPU with the Triton backend, whose launches are collected as on a GPU and do not run;
products give empty tensors of the right shape. So nothing large is computed or held, and no result means anything.

The time that a step takes the host is measured apart: with as many layers, but narrow ones, and Triton launching for
real on a driver that does nothing (`null_driver`). Operations of PyTorch run on the CPU there: they take about what
they take before they launch something on a GPU, as next to nothing is computed.
"""

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from dkv.bench import report
from dkv.core.sequences import Sequences
from dkv.engine.config import DiffusionConfig
from dkv.engine.ending import Ending, id_list
from dkv.engine.engine import GRAPHED, Engine
from dkv.engine.noise import Noise
from dkv.kernels import use_backend
from dkv.kernels.common.backend import load
from dkv.kernels.common.operation import Operation
from dkv.models.joining import join_
from dkv.models.spec import ModelSpec
from dkv.models.transformer import Transformer

# Operations that start no kernel, beside views.
FREE = ("empty", "new_empty", "detach", "alias", "lift_fresh", "promote_types", "scalar_tensor", "_unsafe_view")
# Operations after which the host has a value, or a shape that depends on values.
WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "bincount")
PRODUCTS = ("mm", "addmm", "bmm", "embedding", "linear")


class Count(TorchDispatchMode):
    """Counts the operations that are done under it, by kind."""

    def __init__(self):
        super().__init__()
        self.kinds: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if name in WAITS:
            self.kinds["waits"] += 1
        elif name == "lift_fresh" and args[0].dim():
            self.kinds["uploads"] += 1
        elif not (function.is_view or name.startswith(FREE)):
            self.kinds["aten"] += 1
        if name in PRODUCTS and "out" in kwargs:
            return kwargs["out"]
        if name in PRODUCTS:
            shaped = function(*tree_map_only(Tensor, lambda x: x.to("meta"), args), **kwargs)
            return torch.zeros(shaped.shape, dtype=shaped.dtype)
        made = function(*args, **kwargs)
        # What a kernel does not write must be the same in every run; confidences are those of no sure token.
        return made.fill_(-made.is_floating_point()) if name.startswith(("empty", "new_empty")) else made


def steps_of(
    spec: ModelSpec, settings: dict[str, Any], batch: int = 1, prompt: int = 448, new: int = 64, steps: int = 4
) -> Iterator[tuple[bool, Counter[str]]]:
    """Take the first steps of a generation on an H100, as far as the host is concerned.

    Args:
        spec: of the model; weights of its size are never touched.
        settings: of `dkv.DiffusionConfig`.
        batch, prompt, new: rows, and their slots.
        steps: to take.

    Yields:
        Whether the step is full, and how often the host starts each kind: "aten", "triton", "uploads", "waits".
    """
    # Where there is no Triton, this module can still be imported.
    from dkv.kernels.common.launch import Chip, trial

    model = model_of(spec, torch.bfloat16)
    with use_backend("triton"), trial(chip=Chip("sm_90", 132)) as tried, torch.no_grad(), real_states():
        engine = engine_of(model, settings, batch, prompt, new)
        for _ in range(steps):
            full, shape = engine.is_full, engine.shape()
            with Count() as count:
                engine.advance(shape)
            count.kinds["triton"] = len(tried.calls)
            # They hold on to their arguments.
            tried.calls.clear()
            yield full, count.kinds
            engine.read_status()


@contextlib.contextmanager
def real_states() -> Iterator[None]:
    """Where launches are only collected, the few that plan and take a step are done by PyTorch as well, uncounted: the
    next step follows from what they write."""
    backend_of = Operation.backend

    def backend(self: Operation, like: Tensor) -> Callable[..., Any]:
        counted = backend_of(self, like)
        if self.package not in ("plan", "commit"):
            return counted

        def run(*args: Any) -> Any:
            counted(*args)
            with _disable_current_modes():
                return getattr(load(self.package, "torch"), self.name)(*args)

        return run

    with mock.patch.object(Operation, "backend", backend):
        yield


def model_of(spec: ModelSpec, dtype: torch.dtype) -> Transformer:
    """A model whose weights have memory that is not touched, and so takes no room."""
    with torch.device("meta"):
        model = join_(Transformer(spec).eval().requires_grad_(False))
    return model.to(dtype).to_empty(device="cpu")


def engine_of(model: Transformer, settings: dict[str, Any], batch: int, prompt: int, new: int) -> Engine:
    """An engine before its first step, that goes about it as on a GPU; what a generation makes once is there."""
    spec, config = model.spec, DiffusionConfig(**{"max_new_tokens": new, **settings})
    ids, mask = torch.zeros(batch, prompt, dtype=torch.int64), torch.ones(batch, prompt, dtype=torch.bool)
    budgets = [config.of_row("max_new_tokens", row) for row in range(batch)]
    rows = Sequences.after_prompts(ids, mask, budgets, spec.mask_token_id)
    eos = id_list(config.eos_token_id)
    ending = Ending(eos, None, batch, ids.device) if eos else None
    engine = Engine(model, rows, config, Noise([0] * batch, rows), spec.mask_token_id, ending=ending)
    engine.padding = GRAPHED
    model.rope_tables(engine.cache.slots)
    for layer in range(spec.num_layers):
        engine.cache.layer(layer, torch.empty(1, spec.num_kv_heads, spec.head_dim, dtype=model.dtype))
    return engine


def narrow(spec: ModelSpec) -> ModelSpec:
    """As many layers, and heads that share keys alike, but products whose call takes longer than their arithmetic."""
    group = spec.num_heads // spec.num_kv_heads
    sizes = {"vocab_size": 256, "mask_token_id": 255, "hidden_size": 16, "intermediate_size": 16}
    return replace(spec, **sizes, num_heads=group, num_kv_heads=1, head_dim=32)


def times_of(
    spec: ModelSpec, settings: dict[str, Any], batch: int = 1, prompt: int = 448, new: int = 64, rounds: int = 30
) -> dict[bool, float]:
    """Milliseconds that a step of a `narrow` model takes the host, full (True) and cached (False): medians.

    float32, as the products of a CPU in bfloat16 are slow ones. Between them the generation goes on in PyTorch, as
    nothing comes of launches that do nothing: the first full and the first cached step are taken again and again.

    Raises:
        RuntimeError: the kernels of this process run in Triton's interpreter.
    """
    from dkv.bench.null_driver import null_driver

    model, times = model_of(narrow(spec), torch.float32), defaultdict(list)
    for weight in model.parameters():
        weight.zero_()
    with torch.no_grad(), one_thread():
        engine = engine_of(model, settings, batch, prompt, new)
        for _ in range(FIRST_STEPS):
            full, shape, plan = engine.is_full, engine.shape(), engine.next_plan
            if full not in times:
                with use_backend("triton"), null_driver():
                    # Kernels are compiled the first time.
                    for _ in range(1 + rounds):
                        # Of the processor, which does nothing but this here: others may want it too.
                        start = time.thread_time()
                        engine.advance(shape)
                        times[full].append(1e3 * (time.thread_time() - start))
                        engine.next_plan = plan
            engine.advance(shape)
            engine.read_status()
    return {full: median(found[1:]) for full, found in times.items()}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes in the thread that calls it: others would only wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Within so many steps is one that is cached, if any is.
FIRST_STEPS = 4
# By name, settings that change what a step is made of, and how many rows.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 1),
    "decode 8": ({"cache": {"name": "decode", "refresh": 8}}, 1),
    "decode 8, threshold": ({"cache": {"name": "decode"}, "threshold": 0.9}, 1),
    "decode 8, end token": ({"cache": {"name": "decode"}, "eos_token_id": 3}, 1),
    "decode 8, drawn": ({"cache": {"name": "decode"}, "temperature": 0.7}, 1),
    "decode 8, 4 budgets": ({"cache": {"name": "decode"}, "max_new_tokens": [64, 48, 32, 16]}, 4),
    "greedy 4": ({"cache": {"name": "greedy", "refresh": 4}, "confidence": "random", "schedule": "blocks"}, 1),
    "prefill": ({"cache": "prefill"}, 1),
    "dual": ({"cache": "dual", "block_length": 32}, 1),
    "suffix": ({"cache": "suffix", "block_length": 32}, 1),
    "suffix, falling threshold": ({"cache": "suffix", "block_length": 32, "threshold": 0.9, "threshold_decay": 0.4}, 1),
}


def measure(spec: ModelSpec, names: Sequence[str] = tuple(CASES), timed: bool = False) -> Iterator[dict[str, Any]]:
    """A result line for the full and for the cached steps of each case: launches, uploads and waits, by number, and
    where it is `timed` what they take the host in ms."""
    for name in names:
        settings, batch = CASES[name]
        times = times_of(spec, settings, batch) if timed else {}
        both = [list(steps_of(replace(spec, num_layers=n), settings, batch)) for n in (spec.num_layers, 1)]
        for kind in (True, False):
            # The last of its kind: the first ones may be different.
            found = [[kinds for full, kinds in steps if full == kind][-1:] for steps in both]
            if not all(found):
                continue
            (whole,), (single,) = found
            launches, one = (kinds["aten"] + kinds["triton"] for kinds in (whole, single))
            per_layer = (launches - one) / (spec.num_layers - 1) if spec.num_layers > 1 else None
            counts = {key: whole[key] for key in ("aten", "triton", "uploads", "waits")}
            yield {"case": name, "step": "full" if kind else "cached", "launches": launches, **counts} | {
                "per_layer": per_layer,
                "host_ms": times.get(kind),
            }


CELLS = {
    "policy": "{case}",
    "step": "{step}",
    "launches": "{launches}",
    "PyTorch": "{aten}",
    "Triton": "{triton}",
    "a layer": "{per_layer:.1f}",
    "uploads": "{uploads}",
    "waits": "{waits}",
    "host ms": "{host_ms:.1f}",
}


def table(found: dict[str, Any]) -> str:
    """The figures as text."""
    return report.table(found["rows"], CELLS, left=2)
