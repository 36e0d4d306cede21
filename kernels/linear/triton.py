"""Products with weights of 8 or 4 bits in Triton: for few rows, for which reading the weights is what takes the time.

A program brings whole numbers to the dtype of x in registers, on their way to the tensor cores. Where there are few
tiles of outputs the inputs are divided among several programs, and a second kernel adds up their sums, always in the
same order: a tile that is narrower instead reads all of x for fewer outputs.
"""

from collections.abc import Iterator
from itertools import product

import torch
import triton
from torch import Tensor

from dkv.kernels.common.arguments import computable, constants, precision, restored, strided, strided_alone, unit_stride
from dkv.kernels.common.launch import Call, Launch, LaunchTable, batch_invariant, splits
from dkv.kernels.common.prepared import Scratch
from dkv.kernels.dev.cases import Case, calls_of, meta
from dkv.kernels.linear import torch as fallback
from dkv.kernels.linear.four import GROUPS
from dkv.kernels.linear.kernel import add_kernel, linear_kernel

# The launches. Regime: rows up to (with experts, those of one if all had as many), and bytes of a number of x. None has
# been timed on a GPU; `dkv audit` finds no spilled registers. Up to 32 rows weights go from shared memory through
# registers into `mma.sync`, from 64 on wgmma takes them from shared memory again.
ROWS = (16, 32, 64, 128)
_INTERPRETER = {(rows, number): Launch((rows, 256, 256), 4) for rows, number in product(ROWS, (2, 4))}
# Where a program may have more than 100 KB of shared memory: twice the outputs for which a tile of rows is read.
_WIDE = {
    (32, 2): Launch((32, 128, 128), 8, 4),
    (64, 2): Launch((64, 128, 128), 8, 3),
}
_WIDE_FOUR = {
    (16, 2): Launch((16, 128), 4, 4),
    (32, 2): Launch((32, 128), 8, 4),
    (64, 2): Launch((64, 128), 8, 3),
}
# Tile: (rows, outputs, inputs).
TABLE = LaunchTable(
    "int8_linear",
    {
        "default": {
            (16, 2): Launch((16, 64, 128), 4, 4),
            (32, 2): Launch((32, 64, 128), 4, 3),
            (64, 2): Launch((64, 64, 64), 4, 3),
            (128, 2): Launch((128, 64, 64), 8, 2),
            (16, 4): Launch((16, 64, 64), 4, 4),
            (32, 4): Launch((32, 64, 64), 4, 3),
            (64, 4): Launch((64, 64, 32), 8, 2),
            (128, 4): Launch((64, 64, 32), 8, 2),
        },
        **dict.fromkeys(("sm_80", "sm_90", "sm_100"), _WIDE),
        # On the others it spills.
        "sm_90": _WIDE | {(128, 2): Launch((128, 128, 64), 8, 3)},
        "interpreter": _INTERPRETER,
    },
    [
        Launch(tile, warps, stages)
        for tile in product(ROWS, (64, 128), (64, 128, 256))
        for warps, stages in product((4, 8), (3, 4))
    ],
)
# Tile: (rows, outputs); the inputs of a tile are a group.
FOUR_TABLE = LaunchTable(
    "int4_linear",
    {
        "default": {
            (16, 2): Launch((16, 64), 4, 4),
            (32, 2): Launch((32, 64), 4, 3),
            (64, 2): Launch((64, 64), 8, 2),
            (128, 2): Launch((64, 64), 8, 2),
            # Larger tiles spill where experts have several: a product of float32 is three.
            **{(rows, 4): Launch((16, 32), 4, 3) for rows in ROWS},
        },
        **dict.fromkeys(("sm_80", "sm_90", "sm_100"), _WIDE_FOUR),
        "interpreter": {regime: Launch(launch.tile[:2], 4) for regime, launch in _INTERPRETER.items()},
    },
    [
        Launch(tile, warps, stages)
        for tile in product(ROWS, (64, 128, 256))
        for warps, stages in product((4, 8), (3, 4))
    ],
)
# Programs of a processor; the most parts of the inputs, and the fewest tiles of one. From 128 programs on some 5 MB of
# weights are on their way at a time, where the bandwidth of an H100 times the time of an access is about 3 MB, and more
# parts would only be more to add up: arithmetic, not timed.
EACH, MOST_PARTS, LEAST_TILES = 2, 8, 4
ADD = Launch((1024,), 4)


def int8_linear(x, weight, scales, bias, ends):
    return _linear(x, weight, scales, bias, ends, TABLE)


def int4_linear(x, weight, scales, bias, ends):
    return _linear(x, weight, scales, bias, ends, FOUR_TABLE)


def _linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, ends: Tensor | None, table: LaunchTable):
    if x.dtype == torch.float64:
        return getattr(fallback, table.name)(x, weight, scales, bias, ends)
    rows = computable(unit_stride(x.reshape(x.shape[:-1].numel(), x.shape[-1])))
    out = torch.empty(len(rows), weight.shape[-2], dtype=rows.dtype, device=x.device)
    if out.numel():
        bias = bias if bias is None else computable(bias)
        table.start(_plan, (rows, unit_stride(weight), scales, bias, ends, out), batch_invariant())
    return restored(out, x.dtype).view(*x.shape[:-1], out.shape[-1])


def _plan(x, weight, scales, bias, ends, out, invariant):
    (rows, size), outputs, four = x.shape, out.shape[1], weight.dtype == torch.uint8
    alone = strided_alone if ends is None else strided
    given = {"x": strided(x), "weight": alone(weight), "scales": alone(scales), "ends": ends}
    given |= {"rows": rows, "outputs": outputs, "size": size}

    def calls(launch: Launch) -> Iterator[Call]:
        block_r, block_n, *inputs = launch.tile
        block_k = size // scales.shape[-1] if four else inputs[0]
        of_rows, of_outputs = triton.cdiv(rows, block_r), triton.cdiv(outputs, block_n)
        tiles = triton.cdiv(size, block_k)
        # One row is in one tile, or with one expert.
        busy = 1 if invariant else of_rows if ends is None else min(len(ends), rows)
        parts = splits(x.device, busy * of_outputs, max(1, min(MOST_PARTS, tiles // LEAST_TILES)), each=EACH)
        sums = out if parts == 1 else Scratch("sums", (parts, rows, outputs), torch.float32)
        known = {"BLOCK_R": block_r, "BLOCK_N": block_n, "BLOCK_K": block_k, "EVEN": size % block_k == 0, "FOUR": four}
        own = {"out": sums, "of_part": triton.cdiv(tiles, parts) * block_k}
        own["bias"] = strided(bias) if parts == 1 else None
        own["C"] = constants(**known, PRECISION=precision(x), STAGES=launch.stages)
        yield Call(linear_kernel, (of_rows if ends is None else len(ends), of_outputs, parts), launch, given | own)
        if parts > 1:
            added = {"parts": sums, "bias": strided(bias), "out": out, "total": rows * outputs, "outputs": outputs}
            (block,) = ADD.tile
            grid = (triton.cdiv(rows * outputs, block),)
            yield Call(add_kernel, grid, ADD, added | {"PARTS": parts, "BLOCK": block})

    # With DKV_BATCH_INVARIANT=1 the small tile is used for any number of rows: another may change the order of sums.
    of_weight = rows if ends is None else triton.cdiv(rows, len(ends))
    fit = next((most for most in ROWS if of_weight <= most or invariant), ROWS[-1])
    return (fit, x.element_size()), calls


# Of audit cases: experts, outputs and inputs. The odd ones fill no tile, and have a bias.
_SAMPLES = {"": (0, 4096, 4096), " odd": (0, 1001, 4000), " ends": (64, 1024, 512)}


def audit_cases(arch: str) -> Iterator[Case]:
    """Every launch, the plainest and those with more; and the sums of parts."""
    sums = {}
    for table, operation in ((TABLE, int8_linear), (FOUR_TABLE, int4_linear)):
        for regime, launch in table.on(arch):
            most, number = regime[0], "bf16" if regime[1] == 2 else "fp32"
            for kind, (experts, outputs, size) in _SAMPLES.items():
                of = (experts, outputs) if experts else (outputs,)
                bias = meta(outputs, dtype=number) if kind == " odd" else None
                ends = meta(experts, dtype=torch.int32) if experts else None
                sample = (
                    meta((most - 1) * max(experts, 1), size, dtype=number),
                    *_weights(table, *of, size=size),
                    bias,
                    ends,
                )
                first, *added = calls_of(arch, regime, launch, operation, *sample)
                yield Case(f"{table.name} {most} rows{kind} {number}", first, ("tensor core", "async copy"))
                sums |= {f"sum of {call.arguments['PARTS']} parts{kind} {number}": call for call in added}
    yield from (Case(name, call) for name, call in sums.items())


def _weights(table: LaunchTable, *outputs: int, size: int) -> tuple[Tensor, Tensor]:
    """Without memory."""
    if table is TABLE:
        return meta(*outputs, size, dtype=torch.int8), meta(*outputs, dtype="fp32")
    group = next(group for group in GROUPS if size % group == 0)
    return meta(*outputs, size // 2, dtype=torch.uint8), meta(*outputs, size // group, dtype="fp32")
