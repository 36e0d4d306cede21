"""A model that several processes share: what each of them has of it, and where what they compute is added up.

Of every layer a process has some heads, with their keys and values, and some features of the MLP or of each expert; of
the tables some ids. The residual is whole everywhere: what attention and MLP give is a sum over the processes.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkv.kernels.choose.torch import products
from dkv.kernels.common.workspace import Workspace
from dkv.models.families.base import Family, Piece
from dkv.models.gemma_layer import Attention
from dkv.models.layers import Network
from dkv.parallel import Ranks


@dataclass(frozen=True)
class Split:
    """How a parameter is shared out: along a dimension, which holds `runs` of one size that are all split."""

    dim: int
    runs: int = 1


# By the end of its name, how a parameter of any family is shared out; all others every process has whole. Outputs are
# split before attention and the activation, inputs behind them; ids in the tables.
SPLITS = {
    r"^(embed|head)\.(weight|bias)": Split(0),
    r"\.([qkv]|gate|up)_proj\.(weight|bias)": Split(0),
    r"\.(o|down)_proj\.weight": Split(1),
    # Gate and up of all experts in one tensor [E, 2 m, d], and what follows them [E, d, m].
    r"\.experts\.gate_up(\.weight|_proj)": Split(1, runs=2),
    r"\.experts\.down(\.weight|_proj)": Split(2),
}
# Modules whose outputs are added up, but for those inside one of them; a bias is added in process 0 alone.
SUMS = re.compile(r"(?<!shared)\.(o_proj|down_proj|experts)$")
SUMMED_BIAS = re.compile(r"\.(o|down)_proj\.bias$")


class Table(nn.Embedding):
    """The embeddings of some ids, from `first` on; those of others come from their processes."""

    def __init__(self, table: nn.Embedding, ranks: Ranks):
        mine = ranks.share(table.num_embeddings, "ids")
        super().__init__(mine.stop - mine.start, table.embedding_dim, _weight=table.weight[mine])
        self.first, self.ranks = mine.start, ranks

    def forward(self, ids: Tensor) -> Tensor:
        own = ids - self.first
        inside = (own >= 0) & (own < self.num_embeddings)
        found = super().forward(own.clamp(0, self.num_embeddings - 1))
        # Zeros but for one: the sum is exact.
        return self.ranks.sum_(found.masked_fill(~inside[..., None], 0))


class Head(nn.Module):
    """The logits of some ids; a `dkv.kernels.choose.part.Part`."""

    def __init__(self, head: nn.Linear, ranks: Ranks):
        super().__init__()
        self.in_features, self.out_features, self.ranks = head.in_features, head.out_features, ranks
        self.own = ranks.share(head.out_features, "ids")
        self.first, self.number, self.parts = self.own.start, ranks.rank, ranks.size
        self.weight, self.bias = (None if x is None else nn.Parameter(x[self.own]) for x in (head.weight, head.bias))

    def forward(self, x: Tensor) -> Tensor:
        """The logits of all ids, which are exchanged: for who needs them all."""
        most = -(-self.out_features // self.ranks.size)
        logits = F.linear(x, self.weight, self.bias)
        every = self.ranks.gathered(F.pad(logits, (0, most - logits.shape[-1])))
        sizes = (self.out_features * (i + 1) // self.ranks.size for i in range(self.ranks.size))
        starts = [0, *sizes]
        return torch.cat([part[..., : starts[i + 1] - starts[i]] for i, part in enumerate(every)], -1)

    def strips(self, x: Tensor) -> Iterator[Tensor]:
        """The own logits [R, C] strip by strip, in the same memory."""
        return products(x, self.weight, self.bias, Workspace())

    def gathered(self, x: Tensor) -> Tensor:
        return self.ranks.gathered(x)


class Cut(NamedTuple):
    """What is read of a tensor of a checkpoint: parts, which are then put together along a dimension."""

    parts: list[tuple[slice, ...]]
    dim: int


Pieces = Mapping[str, list[Piece]]


def share_(model: Network, ranks: Ranks, family: Family, pieces: Pieces) -> tuple[Pieces, dict[str, Cut]]:
    """Leave of a model without storage what is this process's, and let it add up what all compute.

    Args:
        model: whole, and on no device.
        family, pieces: of its checkpoint, as `skeleton` gives them.

    Returns:
        The tensors of the checkpoint and what they are to the parameters that are left; and what is read of them.

    Raises:
        ValueError: heads, features or ids cannot be split over so many processes.
    """
    check_heads(model.spec, ranks.size)
    whole = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    model.ranks = ranks
    for name, module in list(model.named_modules()):
        _shrink(name, module, ranks)
        if SUMS.search(name):
            # As torch's own plans do it: the module keeps its name and its parameters theirs.
            module.register_forward_hook(lambda _, given, found: ranks.sum_(found))
    model.embed, model.head = Table(model.embed, ranks), Head(model.head, ranks)
    if model.spec.tied_head:
        model.head.weight = model.embed.weight
    left = family.pieces({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    cuts = {theirs: _cut(pieces[theirs], parts, whole, ranks) for theirs, parts in left.items()}
    return left, cuts


def device_of(ranks: Ranks, given: torch.device | None, pack: bool | None, weights: str | None) -> torch.device:
    """Where a process has its part; ValueError: it was given otherwise, or what is of whole models is asked for."""
    if given not in (None, ranks.device):
        raise ValueError(f"device={str(given)!r} does not go with ranks: dkv.parallel.start takes it")
    if pack or weights:
        named = "pack=True" if pack else f"weights={weights!r}"
        raise ValueError(f"{named} is of whole models: leave it out where processes share one")
    return ranks.device


def check_heads(spec: Any, processes: int) -> None:
    """Raise ValueError if the heads of some layer cannot be split over so many processes."""
    for kind in getattr(spec, "layers", [spec]):
        for what, heads in (("key heads", kind.num_kv_heads), ("heads", spec.num_heads)):
            if heads % processes:
                fits = [n for n in range(2, heads + 1) if heads % n == 0]
                start = f"start {' or '.join(map(str, fits))} of them, or one" if fits else "start one"
                raise ValueError(f"{heads} {what} cannot be split over {processes} processes: {start}")


def _split_of(name: str) -> Split | None:
    return next((split for pattern, split in SPLITS.items() if re.search(f"{pattern}$", name)), None)


def _runs(split: Split, size: int, ranks: Ranks) -> list[slice]:
    """What this process has of a dimension that holds `split.runs` runs."""
    run = size // split.runs
    mine = ranks.share(run)
    return [slice(i * run + mine.start, i * run + mine.stop) for i in range(split.runs)]


def _shrink(name: str, module: nn.Module, ranks: Ranks) -> None:
    """Leave of the parameters of a module what is this process's."""
    if name in ("embed", "head"):
        return
    for leaf, parameter in list(module.named_parameters(recurse=False)):
        own = f"{name}.{leaf}"
        if SUMMED_BIAS.search(own) and ranks.rank:
            setattr(module, leaf, None)
        elif split := _split_of(own):
            places = [slice(None)] * split.dim
            parts = [parameter[(*places, run)] for run in _runs(split, parameter.shape[split.dim], ranks)]
            setattr(module, leaf, nn.Parameter(torch.cat(parts, split.dim)))
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    if isinstance(module, Attention):
        queries, keys, size = module.counts
        module.counts = (queries // ranks.size, keys // ranks.size, size)


def _cut(found: list[Piece], left: list[Piece], whole: Mapping[str, tuple[int, ...]], ranks: Ranks) -> Cut:
    """What is read of a tensor that is `found` in the checkpoint, of which these pieces are `left`."""
    parts, start, dim = [], 0, 0
    for piece in found:
        stop, split = start + piece.shape[0], _split_of(piece.parameter)
        rows = slice(start, stop)
        if split is None:
            parts.append((rows,))
        elif (axis := split.dim - len(whole[piece.parameter]) + len(piece.shape)) == 0:
            # Of an expert in a file of its own, gate and up are pieces by themselves.
            one = Split(0, 1 if piece.at else split.runs)
            parts += [(slice(start + run.start, start + run.stop),) for run in _runs(one, piece.shape[0], ranks)]
        else:
            dim, before = axis, (rows, *[slice(None)] * (axis - 1))
            runs = _runs(Split(axis, split.runs), piece.shape[axis], ranks)
            parts += [(*before, run) for run in runs]
        start = stop
    return Cut(parts, dim)


def read(view: Any, cut: Cut) -> Tensor:
    """A tensor of a checkpoint as it is cut; `view` is its `get_slice`, and no more is read.

    Always a copy: what the library gives may be a view, which would hold the memory of the whole.
    """
    return torch.cat([view[part] for part in cut.parts], cut.dim)
