"""Scratch memory that is allocated once and used again at every step."""

import math
from typing import Any

import torch
from torch import Tensor


class Workspace:
    """Named scratch tensors of one generation; a name's memory grows to the largest request.

    Large temporaries cost more than the arithmetic on them: a fresh [64, 32000] tensor is a system
    call and 2,000 page faults. A workspace belongs to one caller and is not shared between threads.
    """

    def __init__(self):
        self._memory: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._taken: dict[tuple[Any, ...], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; it is valid until the same name is taken again."""
        request = name, shape, dtype, device
        if request in self._taken:
            return self._taken[request]
        key, size = (name, dtype, device), math.prod(shape)
        memory = self._memory.get(key)
        if memory is None or memory.numel() < size:
            memory = self._memory[key] = torch.empty(size, dtype=dtype, device=device)
            # They hold on to the memory that this takes the place of.
            self._taken.clear()
        return self._taken.setdefault(request, memory[:size].view(shape))

    def memory(self) -> list[Tensor]:
        """What is held now; requests that are larger take its place."""
        return list(self._memory.values())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(m.numel() * m.element_size() for m in self._memory.values())
