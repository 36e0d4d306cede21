"""A stand-in for CUDA graphs on a CPU: the operations of a step are recorded once, and done again on the same tensors.

As in a graph, whatever Python computed while the step was recorded is baked in, an input is what its tensor holds at
replay, and a result is written where it was written before. What a graph cannot capture is refused.
"""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from dkv.engine import graphs
from tests.waits import NoWaits, Waits


class Tape(NoWaits):
    """Records the operations that are done under it."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.operations.append((function, args, kwargs or {}, tree_leaves(result)))
        return result

    def replay(self):
        for function, args, kwargs, before in self.operations:
            for old, new in zip(before, tree_leaves(function(*args, **kwargs)), strict=True):
                # What was written in place, or is a view of something older, is there already.
                if isinstance(new, torch.Tensor) and storage(new) != storage(old):
                    old.copy_(new)


def storage(x):
    return x.untyped_storage().data_ptr()


class Recorded:
    """A step that has run while it was recorded: its first replay is that run."""

    def __init__(self, tape):
        self.tape, self.ran = tape, False

    def replay(self):
        if self.ran:
            self.tape.replay()
        self.ran = True


class TapeRunner(graphs.GraphRunner):
    """Replays from tapes. The tensors of the state must stay where they are."""

    captured = 0

    def capture(self, shape):
        before = state_of(self.engine)
        with Tape() as tape, pytest.MonkeyPatch.context() as patch:
            # On a CPU these are no operations.
            for name in ("tolist", "numpy", "__array__"):
                patch.setattr(torch.Tensor, name, refused(name))
            self.engine.advance(shape)
        moved = [name for name, place in state_of(self.engine).items() if place != before[name]]
        if moved:
            raise Waits(f"new tensors for {', '.join(moved)}")
        type(self).captured += 1
        return Recorded(tape)


def refused(name):
    def read(*_):
        raise Waits(f"{name} reads from the device")

    return read


def state_of(engine):
    """Where the tensors that outlive a step are, the next plan and keys and values among them."""
    kept = [(holder, name.rpartition(".")[2], value) for holder, name, value in graphs.state_of(engine)]
    planned = [(engine.next_plan, name, value) for name, value in vars(engine.next_plan).items()]
    found = {
        f"{holder.__class__.__name__}.{name}": value.data_ptr()
        for holder, name, value in kept + planned
        if isinstance(value, torch.Tensor)
    }
    for index, pair in engine.cache.layers.items():
        found[f"layer {index}"] = tuple(part.data_ptr() for x in pair for part in x if part is not None)
    return found
