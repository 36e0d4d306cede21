"""What attention may leave behind for `attention_mass`."""

from torch import Tensor

from dkv.kernels.common.stored import Stored


class Shares:
    """The weights of an attention, where it had them in memory anyway, so that they need not be made again.

    Attributes:
        rows: of every row of the batch its queries, its visible slots, and the mean over the heads of the weights that
            these slots have for those queries [N, S]; None: attention has not kept them.
    """

    def __init__(self):
        self.rows: list[tuple[slice, slice, Tensor]] | None = None

    def mass(self, weight: Tensor, like: Stored) -> Tensor:
        """What slots of the first rows get, where queries have `weight` [T]: [B, S], for keys `like` [B, S, H, D]."""
        mass = weight.new_zeros(like.shape[:2])
        for row, (own, seen, mean) in enumerate(self.rows[: like.shape[0]]):
            # A copy, as a product may round differently where memory is aligned otherwise.
            mass[row, seen] = weight[own].clone() @ mean
        return mass

    def given(self, slots: Tensor, like: Tensor) -> Tensor:
        """What the queries of the first rows give to `slots` [W, B], visible ones: [W, T], for `like` [T, ...]."""
        given = like.new_zeros(len(slots), len(like))
        for row, (own, seen, mean) in enumerate(self.rows[: slots.shape[1]]):
            if mean.numel():
                given[:, own] = mean.T.index_select(0, slots[:, row] - seen.start)
        return given
