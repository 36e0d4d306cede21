"""Which keys a query sees."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rules(NamedTuple):
    """Rules of visibility, as `cached_attention` describes them; a key is visible when every rule allows it."""

    query_lengths: Tensor | None = None
    key_ranges: Tensor | None = None
    key_mask: Tensor | None = None
    mask: Tensor | None = None
    query_blocks: Tensor | None = None
    key_blocks: Tensor | None = None

    @property
    def of_pairs(self) -> bool:
        """Whether a key may be visible to some of the queries that are asked, and hidden from others."""
        return self.mask is not None or self.key_blocks is not None

    def visible(self, queries: int, keys: int) -> Tensor | None:
        """bool [B, N or 1, S], or None when every query sees every key."""
        parts = []
        if self.key_ranges is not None:
            slot = torch.arange(keys, device=self.key_ranges.device)
            parts.append(((slot >= self.key_ranges[:, :1]) & (slot < self.key_ranges[:, 1:])).unsqueeze(1))
        if self.key_mask is not None:
            parts.append(self.key_mask.unsqueeze(1))
        if self.mask is not None:
            parts.append(self.mask)
        if self.key_blocks is not None:
            parts.append(self.key_blocks.unsqueeze(1) <= self.query_blocks.unsqueeze(2))
        if self.query_lengths is not None:
            query = torch.arange(queries, device=self.query_lengths.device)
            parts.append((query < self.query_lengths[:, None]).unsqueeze(2))
        visible = None
        for part in parts:
            visible = part if visible is None else visible & part
        return visible
