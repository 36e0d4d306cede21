"""What is kept of a pass for the plan of the next one, where a policy observes passes."""

import torch
import torch.nn.functional as F

from dkv.core.sequences import Sequences
from dkv.engine.observe import Observer
from dkv.policies import Policy
from dkv.policies.elastic import ElasticCache


class Importance:
    """How much of the attention rollout every slot gets (d2Cache): `told`, float64 [B, S], written in place."""

    def __init__(self, policy: Policy, rows: Sequences, layers: int):
        self.told = torch.zeros(rows.masked.shape, dtype=torch.float64, device=rows.masked.device)

    def update(self, observer: Observer) -> None:
        """Take over what a pass told."""
        self.told.copy_(observer.rollout())


class Turning:
    """Whether attention has turned since the pass before: the trigger of `ElasticCache`. All is written in place.

    Attributes:
        told: bool [B, 1], whether the next pass is to compute everything.
        watched: int64 [layers, B], the known slot that got most attention from the slots `asking`, bool [B, S].
        attention: float32 [layers, B, S], what it got from each of them, the mean of the heads; 0 from others.
    """

    def __init__(self, policy: ElasticCache, rows: Sequences, layers: int):
        shape, device = rows.masked.shape, rows.masked.device
        self._policy, self._rows = policy, rows
        self.told = torch.zeros(shape[0], 1, dtype=torch.bool, device=device)
        self.asking = torch.zeros(shape, dtype=torch.bool, device=device)
        self.watched = torch.zeros(layers, shape[0], dtype=torch.int64, device=device)
        self.attention = torch.zeros(layers, *shape, device=device)

    def update(self, observer: Observer) -> None:
        """Compare a pass, whose tokens are not filled in yet, with the one before it."""
        if not observer.layers:
            return  # A network without layers attends to nothing.
        rows, now = self._rows, self._rows.timetable.now()
        asking, layers = self._policy.leftmost(rows, now), range(len(observer.layers))
        both, known = asking & self.asking, rows.everywhere & ~rows.masked
        weight = observer.of_entries(asking)
        mass = torch.stack([observer.attended(number, weight) for number in layers])
        watched = torch.stack((self.watched, mass.masked_fill_(~known, -1).argmax(2)), 1)
        given = torch.stack([observer.given(number, watched[number]) for number in layers])
        again, attention = observer.to_slots(given).unbind(1)
        pair = (x.masked_fill(~both, 0).double() for x in (again, self.attention))
        least = F.cosine_similarity(*pair, dim=2).amin(0).unsqueeze(1)
        self.watched.copy_(watched[:, 1])
        self.attention.copy_(attention.masked_fill(~asking, 0))
        self.asking.copy_(asking)
        # Nothing has turned where no slot asks in both passes, nor right after a full pass, which changes all keys.
        compared = both.any(1, keepdim=True) & ~(self.told | now.full.bool())
        self.told.copy_((least < self._policy.gamma) & compared)


WATCHES = {"mass": Importance, "turn": Turning}


def watch_of(policy: Policy, rows: Sequences, layers: int) -> Importance | Turning | None:
    """What keeps the observations of a policy; None where it makes none."""
    return None if policy.observes is None else WATCHES[policy.observes](policy, rows, layers)
