"""Work that is left out without changing a token."""

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Savings:
    """Work that dkv leaves out without changing a token; each can be put back to measure it.

    Args:
        needed_rows: logits, final norm and the last layer's queries and MLP only at the slots that
            may be decoded now, not at every slot of the pass.
        rotated_keys: keys are stored with their rotary embedding, not rotated again in every pass.
        tail_confidence: confidences in float32 from the tail, not from a float64 softmax of a copy.
        host_counts: the schedule gives the number of active slots; nothing is read back per step.
    """

    needed_rows: bool = True
    rotated_keys: bool = True
    tail_confidence: bool = True
    host_counts: bool = True


def savings_of(value: Any) -> Savings:
    """Savings from themselves or a dict of their switches; ValueError for anything else."""
    if isinstance(value, dict) and value.keys() <= {f.name for f in fields(Savings)}:
        value = Savings(**value)
    if not isinstance(value, Savings) or not all(isinstance(one, bool) for one in asdict(value).values()):
        raise ValueError(f"savings must be a dkv.Savings, or a dict of its switches, got {value!r}")
    return value
