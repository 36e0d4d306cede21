"""Random numbers of a generation, keyed by seed, text, slot and step."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from dkv.core.sequences import Sequences
from dkv.kernels.common import noise

# Where the keys of tokens have their slot: different uses of noise at one step must not share numbers.
_ORDER, _SELECTION = -1, -2


def text_keys(texts: Sequence[Tensor], seeds: Sequence[int]) -> Tensor:
    """Keys int64 [B, 2] of rows, from the tokens of each, on the CPU, and its seed, a 64-bit integer."""
    keys = []
    for text, seed in zip(texts, seeds, strict=True):
        digest = hashlib.blake2b(text.numpy().tobytes(), digest_size=7).digest()
        # The low 64 bits of the seed, as the signed number that a tensor holds.
        keys.append((int.from_bytes(digest, "little"), (seed + 2**63) % 2**64 - 2**63))
    return torch.tensor(keys)


class Noise:
    """The noise of one generation.

    A number is a function of (seed and text of the row, slot, step of the row) and not of the place in the
    batch, so a row gets the same tokens alone and in company. Rows of one text and one seed are drawn alike.

    Args:
        seeds: by row, a 64-bit integer.
        rows: whose texts are read once, before the first pass.
    """

    def __init__(self, seeds: Sequence[int], rows: Sequences):
        self._size = rows.size
        tokens, masked = rows.tokens[:, :-1].cpu(), rows.masked.cpu()
        texts = [tokens[row, :length][~masked[row, :length]] for row, length in enumerate(rows.row_lengths)]
        self._keys = text_keys(texts, seeds).to(rows.tokens.device)

    def order(self, step: Tensor) -> Tensor:
        """Uniform numbers [B, S] by which slots are ordered; `step` int64 [B, 1] is the number of every row's step."""
        return noise.uniform(self._step_keys(_ORDER, step), self._size)

    def selection(self, step: Tensor) -> Tensor:
        """Gumbel noise [B, S] for drawing slots by their confidence."""
        return noise.gumbel(self._step_keys(_SELECTION, step), self._size)

    def token_keys(self, slots: Tensor, rows: Tensor, step: Tensor) -> Tensor:
        """Keys [R, 4] for drawing the tokens of `slots` [R] of `rows` [R]."""
        own = torch.cat((self._keys, step), 1).index_select(0, rows)
        return torch.cat((own[:, :2], slots[:, None], own[:, 2:]), 1)

    def _step_keys(self, use: int, step: Tensor) -> Tensor:
        return torch.cat((self._keys, torch.full_like(step, use), step), 1)
