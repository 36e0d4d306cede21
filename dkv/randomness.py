"""Random numbers of a generation: keyed by seed, text, slot and step, or replayed from a recording."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dkv.canvas import Canvas, column
from dkv.kernels import noise

# (step, (B, L)) -> numbers in [0, 1) for the columns of the caller's layout
Numbers = Callable[[int, tuple[int, int]], Tensor]

# Where the keys of tokens have their slot: different uses of noise at one step must not share numbers.
_ORDER, _SELECTION = -1, -2


class Randomness:
    """The noise of one generation.

    A number is a function of (seed and text of the row, slot, step of the row) and not of the place in the
    batch, so a row gets the same tokens alone and in company. Rows of one text and one seed are drawn alike.

    Args:
        seeds: by row, a 64-bit integer.
        canvas: whose texts are read once, before the first pass.
        numbers: uniform numbers to use for random orders instead of our own.
    """

    def __init__(self, seeds: Sequence[int], canvas: Canvas, numbers: Numbers | None = None):
        self.canvas, self.numbers = canvas, numbers
        self._rows, self._shape = torch.arange(len(seeds)), tuple(canvas.ids.shape)
        tokens, masked = canvas.tokens[:, :-1].cpu(), canvas.masked.cpu()
        keys = []
        for row, length in enumerate(canvas.row_lengths.tolist()):
            text = tokens[row, :length][~masked[row, :length]]
            digest = hashlib.blake2b(text.numpy().tobytes(), digest_size=7).digest()
            # The low 64 bits of the seed, as the signed number that a tensor holds.
            keys.append((int.from_bytes(digest, "little"), (seeds[row] + 2**63) % 2**64 - 2**63))
        self._keys = torch.tensor(keys, device=canvas.tokens.device)

    def order(self, steps: Sequence[int]) -> Tensor:
        """Uniform numbers [B, S] by which slots are ordered, given the step number of every row."""
        if self.numbers is None:
            return noise.uniform(0, self._step_keys(_ORDER, steps), self.canvas.size)
        drawn = {step: self._recorded(step) for step in sorted(set(steps))}
        rows = torch.stack([drawn[step][row] for step, row in zip(steps, self._rows.tolist(), strict=True)])
        return self.canvas.from_caller(rows)

    def _recorded(self, step: int) -> Tensor:
        values = torch.as_tensor(self.numbers(step, self._shape), dtype=torch.float32, device=self._keys.device)
        if tuple(values.shape) != self._shape:
            raise ValueError(f"numbers must return {list(self._shape)} values, got {list(values.shape)}")
        return values

    def selection(self, steps: Sequence[int]) -> Tensor:
        """Gumbel noise [B, S] for drawing slots by their confidence."""
        return noise.gumbel(0, self._step_keys(_SELECTION, steps), self.canvas.size)

    def token_keys(self, slots: Tensor, steps: Sequence[int]) -> Tensor:
        """Keys [B, R, 4] for drawing the tokens of `slots` [B, R]."""
        rows = self._keys.unsqueeze(1).expand(*slots.shape, 2)
        own = torch.stack((slots, column(steps, slots.device).expand_as(slots)), -1)
        return torch.cat((rows, own), -1)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        self._rows, self._keys = self._rows[rows], self._keys[rows]

    def _step_keys(self, use: int, steps: Sequence[int]) -> Tensor:
        step = column(steps, self._keys.device)
        return torch.cat((self._keys, torch.full_like(step, use), step), 1)
