"""What the host does in a step on a GPU, counted on any machine: launches by kind, uploads, waits.

The engine takes its steps on the CPU with the Triton backend, whose launches are collected as on a GPU and do not run;
products give empty tensors of the right shape. So nothing large is computed or held, and no result means anything.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dkv.core.sequences import Sequences
from dkv.engine.config import DiffusionConfig
from dkv.engine.ending import Ending, id_list
from dkv.engine.engine import PADDINGS, Engine
from dkv.engine.noise import Noise
from dkv.engine.stages import Shape
from dkv.kernels import use_backend
from dkv.kernels.common.launch import Chip, trial
from dkv.models.joining import join_
from dkv.models.spec import ModelSpec
from dkv.models.transformer import Transformer

H100 = Chip("sm_90", 132)
# Operations that start no kernel, beside views.
FREE = ("empty", "new_empty", "detach", "alias", "lift_fresh", "promote_types", "scalar_tensor", "_unsafe_view")
WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select")
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
    spec: ModelSpec, settings: dict[str, Any], batch: int, prompt: int, new: int, steps: int
) -> Iterator[tuple[bool, Counter[str]]]:
    """Whether each of the first steps of a generation is full, and what the host starts for it.

    Args:
        spec: of the model; weights of its size are never touched.
        settings: of `dkv.DiffusionConfig`.
        batch, prompt, new: rows, and their slots.
        steps: to take.
    """
    with torch.device("meta"):
        model = join_(Transformer(spec).eval().requires_grad_(False))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    config = DiffusionConfig(max_new_tokens=new, **settings)
    ids, mask = torch.zeros(batch, prompt, dtype=torch.int64), torch.ones(batch, prompt, dtype=torch.bool)
    budgets = [config.of_row("max_new_tokens", row) for row in range(batch)]
    rows = Sequences.after_prompts(ids, mask, budgets, spec.mask_token_id)
    eos = id_list(config.eos_token_id)
    ending = Ending(eos, None, batch, ids.device) if eos else None
    with use_backend("triton"), trial(chip=H100) as tried, torch.no_grad():
        engine = Engine(model, rows, config, Noise([0] * batch, rows), spec.mask_token_id, ending=ending)
        engine.padding = PADDINGS["cuda"]
        for _ in range(steps):
            status, size = engine.status, rows.size
            shape = Shape(engine.padding.filled(status.active, size), engine.padding.filled(status.scored, size))
            full, before = status.active == rows.row_lengths, len(tried.calls)
            with Count() as count:
                engine.advance(shape)
            count.kinds["triton"] = len(tried.calls) - before
            yield full, count.kinds
            engine._read_status()
