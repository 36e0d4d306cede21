"""Random numbers of a generation: keyed by prompt, slot and step, or replayed from a recording."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from dkv.canvas import Canvas
from dkv.kernels import noise

# (step, (B, P + new tokens)) -> numbers in [0, 1) for the columns of the caller's layout
Numbers = Callable[[int, tuple[int, int]], Tensor]

# Different uses of noise at one step must not share numbers.
_ORDER, _SELECTION = 1, 2


class Randomness:
    """The noise of one generation.

    A number is a function of (seed, prompt, slot, step) and not of the place in the batch, so a
    prompt gets the same tokens alone and in company. Equal prompts of a batch are told apart by
    counting them.

    Args:
        seed: 64-bit integer.
        canvas: whose prompts give the row keys; they are read once, before the first pass.
        numbers: uniform numbers to use for random orders instead of our own.
    """

    def __init__(self, seed: int, canvas: Canvas, numbers: Numbers | None = None):
        self.seed, self.canvas, self.numbers = seed, canvas, numbers
        seen: dict[bytes, int] = {}
        keys = []
        prompts = canvas.tokens.cpu()
        for row, length in zip(prompts, canvas.prompt_lengths.flatten().tolist(), strict=True):
            digest = hashlib.blake2b(row[:length].numpy().tobytes(), digest_size=7).digest()
            keys.append((int.from_bytes(digest, "little"), seen.setdefault(digest, 0)))
            seen[digest] += 1
        self._rows = torch.tensor(keys, device=canvas.tokens.device)

    def order(self, step: int) -> Tensor:
        """Uniform numbers [B, S] by which slots are ordered: one set per step number."""
        if self.numbers is None:
            return noise.uniform(self.seed, self._keys(_ORDER, step), self.canvas.size)
        shape = tuple(self.canvas.sequences().shape)
        values = torch.as_tensor(self.numbers(step, shape), dtype=torch.float32, device=self._rows.device)
        if tuple(values.shape) != shape:
            raise ValueError(f"numbers must return {list(shape)} values, got {list(values.shape)}")
        return self.canvas.from_caller(values)

    def selection(self, step: int) -> Tensor:
        """Gumbel noise [B, S] for drawing slots by their confidence."""
        return noise.gumbel(self.seed, self._keys(_SELECTION, step), self.canvas.size)

    def token_keys(self, slots: Tensor, step: int) -> Tensor:
        """Row keys [B * R, 4] for drawing the tokens of `slots` [B, R]."""
        rows = self._rows.unsqueeze(1).expand(*slots.shape, 2)
        own = torch.stack((slots, torch.full_like(slots, step)), -1)
        return torch.cat((rows, own), -1).flatten(0, 1)

    def _keys(self, use: int, step: int) -> Tensor:
        own = torch.tensor([[use, step]], device=self._rows.device).expand(len(self._rows), 2)
        return torch.cat((self._rows, own), 1)
