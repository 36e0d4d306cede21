"""What attention may leave behind for `attention_mass`."""

from torch import Tensor


class Shares:
    """The weights of an attention, where it had them in memory anyway, so that they need not be made again.

    Attributes:
        rows: of every row of the batch [N, S], the mean of the weights over the heads, of its queries and visible slots
            alone; None: attention has not kept them.
    """

    def __init__(self):
        self.rows: list[Tensor] | None = None
