"""`commit_`: its arguments, and their checks."""

import torch
from torch import Tensor

from dkv.kernels.commit import reference
from dkv.kernels.common import checks
from dkv.kernels.common.dtypes import FLOATS, INTEGERS
from dkv.kernels.common.operation import Operation

COMMIT = Operation(reference.commit_, lambda *args: torch.empty_like(args[3]), mutates=("canvas",))


def commit_(
    canvas: Tensor,
    token: Tensor,
    log_confidence: Tensor,
    eligible: Tensor,
    count: Tensor,
    *,
    positions: Tensor | None = None,
    validate: bool = True,
) -> Tensor:
    """Write the tokens of the `count` most confident eligible slots of every row, in place.

    Args:
        canvas: [B, S] int64 token ids.
        token, log_confidence, eligible: [B, N] int64, float and bool, of the slots in `positions`.
        count: [B] integers; a row with fewer eligible slots commits those it has.
        positions: [B, N] int64, ascending where eligible; None: N = S, every slot in order. Equal
            confidences go to the lowest position, and NaN counts as -inf.
        validate: check that the positions are in range and no eligible confidence is NaN.

    Returns:
        [B, N] bool, which entries were committed.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a confidence is NaN.
        IndexError: a position is outside 0..S-1.
    """
    b, s = checks.shape("canvas", canvas, None, None)
    n = s if positions is None else positions.shape[-1]
    for name, x in (("token", token), ("log_confidence", log_confidence), ("eligible", eligible)):
        checks.shape(name, x, b, n)
    checks.shape("count", count, b)
    checks.dtype("count", count, INTEGERS)
    checks.same_dtype(canvas=canvas, token=token)
    checks.dtype("log_confidence", log_confidence, FLOATS)
    checks.dtype("eligible", eligible, (torch.bool,))
    checks.same_device(
        canvas=canvas, token=token, log_confidence=log_confidence, eligible=eligible, count=count, positions=positions
    )
    if positions is not None:
        checks.shape("positions", positions, b, n)
        checks.dtype("positions", positions, (torch.int64,))
    if validate:
        if positions is not None:
            checks.index_range("positions", positions, s)
        if bool((log_confidence.isnan() & eligible).any()):
            raise ValueError("log_confidence is NaN at an eligible slot: look for NaN in the logits")
    return COMMIT(canvas, token, log_confidence, eligible, count, positions)
