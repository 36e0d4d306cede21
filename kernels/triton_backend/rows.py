"""Rows between canvas order and active order, in Triton: copied as integers of the width of their numbers."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dkv.kernels import torch_backend
from dkv.kernels.triton_backend.cases import Case
from dkv.kernels.triton_backend.launch import Launch, LaunchTable

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _rows_kernel(
    canvas, index, active, rows, columns, stride_cb, stride_cs, stride_ib, stride_in, stride_ab, stride_an,
    GATHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of the active rows of a batch row; grid (tiles of rows x tiles of columns, B)."""
    tile, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    across = tl.cdiv(columns, COLUMNS)
    r = tile // across * ROWS + tl.arange(0, ROWS)
    c = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.load(index + row * stride_ib + r * stride_in, mask=r < rows, other=0)
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    canvas_at = canvas + row * stride_cb + (slot * stride_cs)[:, None] + c[None, :]
    active_at = active + row * stride_ab + (r * stride_an)[:, None] + c[None, :]
    if GATHER:
        tl.store(active_at, tl.load(canvas_at, mask=mask, other=0), mask=mask)
    else:
        tl.store(canvas_at, tl.load(active_at, mask=mask, other=0), mask=mask)


# Tile: (rows, columns). Regime: columns of a row up to, or "wide". As few rows are active, a program takes few.
TABLE = LaunchTable(
    "rows",
    {
        "default": {1: Launch((128, 1), 4), 64: Launch((16, 64), 4), "wide": Launch((1, 1024), 4)},
        "interpreter": {1: Launch((1024, 1), 4), 64: Launch((256, 64), 4), "wide": Launch((16, 1024), 4)},
    },
    candidates=tuple(
        Launch((rows, columns), warps)
        for rows, columns in ((128, 1), (256, 1), (4, 64), (16, 64), (1, 512), (1, 1024), (2, 1024), (1, 2048))
        for warps in (1, 2, 4)
    ),
)


def gather_rows(x, index, *, row=None):
    """`dkv.kernels.gather_rows`; `row` fixes the launch."""
    if not _movable(x):
        return torch_backend.gather_rows(x, index)
    active = torch.empty((*index.shape, *x.shape[2:]), dtype=x.dtype, device=x.device)
    _move(x, index, active, True, row)
    return active


def scatter_rows_(x, index, source, *, row=None):
    """`dkv.kernels.scatter_rows_`; `row` fixes the launch."""
    if not _movable(x):
        return torch_backend.scatter_rows_(x, index, source)
    source = source.to(x.dtype)
    if not _movable(source):
        source = source.contiguous()
    _move(x, index, source, False, row)
    return x


def _movable(x: Tensor) -> bool:
    """Whether the numbers of x can be read as integers, and those of a row are side by side."""
    return not x.is_complex() and not x.is_neg() and x.element_size() in INTEGERS and x[:1, :1].is_contiguous()


def _move(canvas: Tensor, index: Tensor, active: Tensor, gather: bool, row: Launch | None) -> None:
    if active.numel() == 0:
        return
    (batch, rows), columns = index.shape, active[0, 0].numel()
    integer = INTEGERS[canvas.element_size()]
    canvas, active = canvas.view(integer), active.view(integer)

    def run(row: Launch) -> None:
        most_rows, most_columns = row.tile
        tiles = triton.cdiv(rows, most_rows) * triton.cdiv(columns, most_columns)
        _rows_kernel[(tiles, batch)](
            canvas, index, active, rows, columns, *canvas.stride()[:2], *index.stride(), *active.stride()[:2],
            GATHER=gather, ROWS=most_rows, COLUMNS=most_columns, num_warps=row.warps,
        )  # fmt: skip

    TABLE.start(canvas.device, 1 if columns == 1 else 64 if columns <= 64 else "wide", run, row)


def audit_cases(arch: str) -> Iterator[Case]:
    """Every row in both directions, for numbers of 2 and 8 bytes."""
    for columns, row in TABLE.on(arch):
        for gather in (True, False):
            for integer in ("i16", "i64"):
                constants = {"GATHER": gather, "ROWS": row.tile[0], "COLUMNS": row.tile[1], "stride_in": 1}
                constants |= {"columns": 1, "stride_cs": 1, "stride_an": 1} if columns == 1 else {}
                arguments = {"canvas": f"*{integer}", "index": "*i64", "active": f"*{integer}"}
                numbers = ("rows", "columns", "stride_cb", "stride_cs", "stride_ib", "stride_ab", "stride_an")
                arguments |= {name: "i32" for name in numbers if name not in constants}
                aligned = ("canvas", "index", "active")
                if columns != 1:
                    aligned += ("columns", "stride_cb", "stride_cs", "stride_ab", "stride_an")
                tile = "x".join(map(str, row.tile))
                name = f"{'gather_rows' if gather else 'scatter_rows_'} {integer} columns {columns} {tile}"
                yield Case(name, _rows_kernel, row, arguments, constants, aligned)
