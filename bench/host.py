"""What the host does in a step on a GPU, counted on any machine: launches by kind, uploads, waits.

The engine takes its steps on the CPU with the Triton backend, whose launches are collected as on a GPU and do not run;
products give empty tensors of the right shape. So nothing large is computed or held, and no result means anything.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dkv.bench import report
from dkv.core.sequences import Sequences
from dkv.engine.config import DiffusionConfig
from dkv.engine.ending import Ending, id_list
from dkv.engine.engine import GRAPHED, Engine
from dkv.engine.noise import Noise
from dkv.kernels import use_backend
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
        if name in PRODUCTS:
            shaped = function(*tree_map_only(Tensor, lambda x: x.to("meta"), args), **kwargs)
            return torch.zeros(shaped.shape, dtype=shaped.dtype)
        made = function(*args, **kwargs)
        # What a kernel does not write must be the same in every run.
        return made.zero_() if name.startswith(("empty", "new_empty")) else made


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

    with torch.device("meta"):
        model = join_(Transformer(spec).eval().requires_grad_(False))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    config = DiffusionConfig(**{"max_new_tokens": new, **settings})
    ids, mask = torch.zeros(batch, prompt, dtype=torch.int64), torch.ones(batch, prompt, dtype=torch.bool)
    budgets = [config.of_row("max_new_tokens", row) for row in range(batch)]
    rows = Sequences.after_prompts(ids, mask, budgets, spec.mask_token_id)
    eos = id_list(config.eos_token_id)
    ending = Ending(eos, None, batch, ids.device) if eos else None
    with use_backend("triton"), trial(chip=Chip("sm_90", 132)) as tried, torch.no_grad():
        engine = Engine(model, rows, config, Noise([0] * batch, rows), spec.mask_token_id, ending=ending)
        engine.padding = GRAPHED
        # What a generation makes once.
        model.rope_tables(engine.cache.slots)
        for layer in range(spec.num_layers):
            like = torch.empty(1, spec.num_kv_heads, spec.head_dim, dtype=model.dtype)
            engine.cache.layer(layer, like)
        for _ in range(steps):
            full, shape = engine.status.active == rows.row_lengths, engine.shape()
            with Count() as count:
                engine.advance(shape)
            count.kinds["triton"] = len(tried.calls)
            # They hold on to their arguments.
            tried.calls.clear()
            yield full, count.kinds
            engine.read_status()


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
}


def measure(spec: ModelSpec, names: Sequence[str] = tuple(CASES)) -> Iterator[dict[str, Any]]:
    """A result line for the full and for the cached steps of each case: launches, uploads and waits, by number."""
    for name in names:
        settings, batch = CASES[name]
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
                "per_layer": per_layer
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
}


def table(found: dict[str, Any]) -> str:
    """The figures as text."""
    return report.table(found["rows"], CELLS, left=2)
