"""The parts of a step alone: its matrix products, and each of its operations, taken from a step as it was computed."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dkv.bench.timing import captured, on_device, synchronise
from dkv.kernels import int8_linear
from dkv.kernels.common.operation import Operation

PRODUCTS = ("mm", "addmm", "bmm", "linear")
# Operations that may be called again with the same arguments: they change nothing, or write the same again.
REPEATED = ("cached_attention", "attention_mass", "rope_scatter_", "rms_norm", "swiglu")
REPEATED += ("choose_token", "choose_token_fused")
# Operations that are products, of weights of fewer bits.
FEWER = ("int8_linear", "int4_linear")
REPEATS = 5
# Seconds that sending a graph may take.
REPLAY = 1e-3

Calls = dict[str, list[Callable[[], Any]]]


class Recorder(TorchDispatchMode):
    """Notes what is computed under it: operations, and the matrix products outside of them.

    Attributes:
        calls: by name, what computes them again from the same tensors; "products" are those of PyTorch, and those with
            weights of fewer bits.
    """

    def __init__(self):
        super().__init__()
        self.calls: Calls = defaultdict(list)
        self._plain, self._inside = Operation.__call__, False

    def __enter__(self):
        plain = self._plain

        def noted(operation: Operation, *args: Any, **hints: Any) -> Any:
            if operation.name in (*REPEATED, *FEWER):
                name = "products" if operation.name in FEWER else operation.name
                self.calls[name].append(partial(plain, operation, *args, **hints))
            self._inside = True
            try:
                return plain(operation, *args, **hints)
            finally:
                self._inside = False

        Operation.__call__ = noted
        return super().__enter__()

    def __exit__(self, *error: Any):
        Operation.__call__ = self._plain
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        call = partial(function, *args, **(kwargs or {}))
        if function.overloadpacket.__name__ in PRODUCTS and not self._inside:
            self.calls["products"].append(call)
        return call()

    def with_head(self) -> Calls:
        """The calls, the product with the head among the products, which a kernel computes with the choice."""
        for call in self.calls["choose_token_fused"][:1]:
            _, hidden, weight, _, _, scales, *_ = call.args
            if isinstance(weight, Tensor):
                plain = scales is None
                product = partial(F.linear, hidden, weight) if plain else partial(int8_linear, hidden, weight, scales)
                self.calls["products"].append(product)
        return self.calls


def milliseconds(calls: list[Callable[[], Any]], device: torch.device) -> float:
    """What these calls take one after the other, replayed from a graph: the least of a few times.

    Raises:
        RuntimeError: they cannot be captured.
    """

    def run() -> None:
        for call in calls:
            call()

    replay = captured(run, device)
    return min(once(replay, device) for _ in range(REPEATS))


def once(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds on the device of a call that is sent at once, such as a graph."""
    synchronise(device)
    elapsed = on_device(call, device, REPLAY)
    synchronise(device)
    return elapsed()
