"""The eager baseline: generation that costs what the published dKV-Cache code costs, on dkv's weights.

Own code, after the description in `tests/golden/SEMANTICS.md`. It gives the tokens of `dkv.generate` and keeps the work
that dkv leaves out: every pass ends in logits of all its slots, the confidence is a float64 softmax of them, keys are
kept unrotated and all rotated again in every pass, and every layer of every cached step concatenates, re-orders and
picks from lists of keys and values. Boolean indices and top-k counts are read back from the device.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dkv
from dkv.bench.baselines.forward import Attend, forward
from dkv.bench.timing import synchronise
from dkv.core.schedule import Step
from dkv.core.sequences import Sequences
from dkv.engine.config import DiffusionConfig
from dkv.engine.inputs import checked_inputs
from dkv.engine.noise import Noise
from dkv.engine.replay import Numbers, RecordedNoise
from dkv.engine.settings import CONFIDENCE_RULES
from dkv.models import Transformer
from dkv.models.layers import Layer
from dkv.policies import Policy


@torch.no_grad()
def generate(
    model: Transformer,
    input_ids: Tensor,
    *,
    new: int,
    steps: int | None = None,
    block_length: int | None = None,
    cache: Policy | None = None,
    confidence: str = "probability",
    numbers: Numbers | None = None,
    on_step: Callable[[bool, float], None] | None = None,
    attend: Attend = F.scaled_dot_product_attention,
) -> Tensor:
    """Continue prompts of one length; the tokens are those of `dkv.generate` with the same settings.

    The mask is never chosen, as in dkv: published, a slot that takes it stays masked and its turn is lost.

    Args:
        model: of LLaDA's kind, its weights in `nn.Linear` (`Options.eager`).
        input_ids: integers [B, P], without padding and masks.
        new: slots to fill per row.
        steps: passes in all; None: one per slot.
        block_length: slots of a block; None: one block.
        cache: `NoCache()`, `DecodeCache(refresh)` or `GreedyCache(refresh, window)`; None: no cache.
        confidence: "probability" of the best token, or "random"; `GreedyCache` takes "random" alone.
        numbers: as in `dkv.generate`; None: those that it draws with `seed=0`.
        on_step: called after each step with whether it was full and its seconds, the device waited for.
        attend: (query [B, H, N, D], key and value [B, H, L, D]) -> [B, H, N, D]: attention without a mask.

    Returns:
        int64 [B, P + new].

    Raises:
        TypeError, ValueError, IndexError: model, inputs or settings are not as above.
    """
    config, input_ids = _checked(model, input_ids, new, steps, block_length, cache, confidence)
    mask_id, plan = model.spec.mask_token_id, config.plan(shifted=False)
    x = torch.cat((input_ids, input_ids.new_full((len(input_ids), new), mask_id)), 1)
    rows = Sequences.after_prompts(
        input_ids, torch.ones_like(input_ids, dtype=torch.bool), [new] * len(input_ids), mask_id
    )
    noise = Noise([0] * len(input_ids), rows) if numbers is None else RecordedNoise(numbers, rows, len(plan))
    way = WAYS[type(config.cache)](config, input_ids.shape[1], mask_id, noise, Counter(s.block for s in plan))
    rope = tuple(torch.cat((table, table), -1)[: x.shape[1]] for table in model.rope_tables(x.shape[1]))
    for step in plan:
        start = time.perf_counter()
        way.begin(step, x)
        active, tokens, by_key = way.active, x, rope
        if active is not None:
            tokens, order = x[active].view(len(x), -1), torch.cat((_slots(active), _slots(~active)), 1)
            by_key = tuple(table[order].unsqueeze(1) for table in rope)
        by_query = tuple(table[..., : tokens.shape[1], :] for table in by_key)
        logits = forward(model, tokens, way.join, by_query, by_key, attend)
        probability = logits.double().softmax(-1) if confidence == "probability" else None
        logits[..., mask_id] = -torch.inf
        guess = logits.argmax(-1)
        certainty = None
        if probability is not None:
            certainty = _widened(probability.gather(-1, guess.unsqueeze(-1)).squeeze(-1), active, -torch.inf)
        chosen = way.choose(step, x, certainty)
        x[chosen] = _widened(guess, active, mask_id)[chosen]
        way.end(step, x, chosen)
        if on_step is not None:
            synchronise(x.device)
            on_step(active is None, time.perf_counter() - start)
    return x


class Plain:
    """Every slot in every pass, nothing kept; the most certain slots of the block are filled.

    Attributes:
        active: bool [B, L], the slots of the pass; None: all.
        quotas: int64 [B, steps of the block], how many slots a row fills in each.
        kept: by layer, keys before their rotation and values, [B, n, d_kv].
    """

    def __init__(self, config: DiffusionConfig, prompt: int, mask_id: int, noise: Noise, steps: Counter[int]):
        self.policy = config.cache
        self.prompt, self.mask_id, self.noise, self.steps = prompt, mask_id, noise, steps
        self.active: Tensor | None = None
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, step: Step, x: Tensor) -> None:
        """Before the pass: the active slots, and at the start of a block what holds for all of it."""
        if step.in_block == 0:
            masks = (x[:, self.prompt + step.start : self.prompt + step.stop] == self.mask_id).sum(1, keepdim=True)
            steps = self.steps[step.block]
            self.quotas = masks // steps + (torch.arange(steps, device=x.device) < masks % steps)
            self.kept = {}

    def join(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, the active ones first; and what the layer keeps of them."""
        return key, value

    def _order(self, step: Step, x: Tensor) -> Tensor:
        """Uniform numbers [B, L] of a step."""
        return self.noise.order(torch.full((len(x), 1), step.index, device=x.device))

    def choose(self, step: Step, x: Tensor, certainty: Tensor | None) -> Tensor:
        """bool [B, L]: the slots that take their token now."""
        certainty = self._order(step, x) if certainty is None else certainty
        open_ = x == self.mask_id
        open_[:, self.prompt + step.stop :] = False
        certainty = torch.where(open_, certainty, -torch.inf)
        chosen = torch.zeros_like(open_)
        for row in range(len(x)):
            chosen[row, certainty[row].topk(int(self.quotas[row, step.in_block])).indices] = True
        return chosen

    def end(self, step: Step, x: Tensor, chosen: Tensor) -> None:
        """After the tokens `chosen` have been written."""

    def _refreshes(self, step: Step) -> bool:
        return bool(self.policy.refresh) and step.in_block % self.policy.refresh == 0


class Decode(Plain):
    """A layer keeps the slots that were known before the pass, which are skipped from the next pass on."""

    def begin(self, step: Step, x: Tensor) -> None:
        super().begin(step, x)
        before = None if step.in_block == 0 else self.known
        self.known, self.keeps = x != self.mask_id, step.in_block > 0
        full = step.in_block < 2 or self._refreshes(step)
        self.active = None if full else ~before

    def join(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.active is None:
            if self.keeps:
                self.kept[layer] = _picked(key, self.known), _picked(value, self.known)
            return key, value
        key, value = (torch.cat(pair, 1) for pair in zip((key, value), self.kept[layer], strict=True))
        order = torch.cat((_slots(self.active), _slots(~self.active)), 1).unsqueeze(-1).expand_as(key)
        by_slot = (torch.zeros_like(t).scatter_(1, order, t) for t in (key, value))
        self.kept[layer] = tuple(_picked(t, self.known) for t in by_slot)
        return key, value


class Greedy(Plain):
    """A layer keeps all slots; the order of filling is drawn per block, so that a pass needs few of them."""

    def begin(self, step: Step, x: Tensor) -> None:
        super().begin(step, x)
        if step.in_block == 0:
            numbers = self._order(step, x).clone()
            numbers[:, : self.prompt + step.start] = -torch.inf
            numbers[:, self.prompt + step.stop :] = -torch.inf
            self.order, self.filled = numbers.sort(dim=1, descending=True, stable=True).indices, 0
        full = step.in_block == 0 or self._refreshes(step)
        self.active = None if full else self.next_active

    def join(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.active is None:
            self.kept[layer] = key, value
            return key, value
        here = _slots(self.active).unsqueeze(-1).expand_as(key)
        joined = []
        for fresh, kept in zip((key, value), self.kept[layer], strict=True):
            joined.append(torch.cat((fresh, _picked(kept, ~self.active)), 1))
            kept.scatter_(1, here, fresh)
        return tuple(joined)

    def choose(self, step: Step, x: Tensor, certainty: Tensor | None) -> Tensor:
        return torch.zeros_like(x, dtype=torch.bool).scatter_(1, self._turn(step.in_block), True)

    def end(self, step: Step, x: Tensor, chosen: Tensor) -> None:
        self.filled += int(self.quotas[0, step.in_block])
        if step.in_block + 1 == self.steps[step.block]:
            return
        turn, masked = self._turn(step.in_block + 1), x == self.mask_id
        self.next_active = chosen.scatter(1, turn, True)
        for row, centres in enumerate(turn):
            for centre in centres.tolist():
                _add_window(self.next_active[row], masked[row], centre, self.policy.window)

    def _turn(self, in_block: int) -> Tensor:
        """int64 [B, n]: the slots that a step fills, in their order."""
        return self.order[:, self.filled : self.filled + int(self.quotas[0, in_block])]


def _add_window(active: Tensor, masked: Tensor, centre: int, window: int) -> None:
    """Add the `window` masked slots nearest to `centre` that `active` [L] lacks, left before right."""
    found = 0
    for distance in range(1, len(active)):
        for slot in (centre - distance, centre + distance):
            if found < window and 0 <= slot < len(active) and masked[slot] and not active[slot]:
                active[slot] = True
                found += 1
        if found == window:
            return


WAYS: dict[type[Policy], type[Plain]] = {dkv.NoCache: Plain, dkv.DecodeCache: Decode, dkv.GreedyCache: Greedy}


def _slots(mask: Tensor) -> Tensor:
    """int64 [B, n]: where `mask` [B, L] holds, equally often in every row."""
    return mask.nonzero()[:, 1].view(len(mask), -1)


def _picked(x: Tensor, mask: Tensor) -> Tensor:
    """[B, n, d]: the slots of x [B, L, d] where `mask` [B, L] holds."""
    return x[mask.unsqueeze(-1).expand_as(x)].view(len(x), -1, x.shape[-1])


def _widened(values: Tensor, active: Tensor | None, fill: float) -> Tensor:
    """[B, L]: the values [B, N] of the active slots at their places."""
    if active is None:
        return values
    wide = torch.full(active.shape, fill, dtype=values.dtype, device=values.device)
    wide[active] = values.flatten()
    return wide


def _checked(
    model: Any, input_ids: Any, new: int, steps: int | None, block_length: int | None, cache: Any, confidence: str
) -> tuple[DiffusionConfig, Tensor]:
    """The settings, and the ids as int64; the errors of `generate`."""
    if isinstance(new, bool) or not isinstance(new, int) or new < 0:
        raise ValueError(f"new must be a whole number of slots, at least 0, got {new!r}")
    plain = isinstance(model, Transformer) and isinstance(model.head, nn.Linear)
    if not plain or not all(isinstance(layer, Layer) for layer in model.layers):
        raise ValueError("model must be a Transformer with its weights in nn.Linear: load it with pack=False")
    if model.spec.shifted or model.spec.qk_norm:
        raise ValueError(f"model must be of LLaDA's kind (no shifted outputs, no q/k norm), got {model.spec.family!r}")
    if confidence in CONFIDENCE_RULES and confidence not in ("probability", "random"):
        raise ValueError(f'confidence must be "probability" or "random" in the eager baseline, got {confidence!r}')
    config = DiffusionConfig(
        max_new_tokens=new,
        steps=steps,
        block_length=block_length,
        cache=cache,
        confidence=confidence,
        schedule="blocks",
    )
    policy = config.cache
    arguments = [getattr(policy, name) for name in ("refresh", "window") if hasattr(policy, name)]
    if type(policy) not in WAYS or policy != type(policy)(*arguments):
        raise ValueError(f"cache must be NoCache(), DecodeCache(refresh) or GreedyCache(refresh, window), got {policy}")
    if isinstance(policy, dkv.GreedyCache) and confidence != "random":
        raise ValueError(f'cache=GreedyCache(...) needs confidence="random", as published, got {confidence!r}')
    input_ids, _ = checked_inputs(model, input_ids, None, config)
    if bool((input_ids == model.spec.mask_token_id).any()):
        raise ValueError(f"input_ids must not hold the mask ({model.spec.mask_token_id}): remove it from the prompts")
    return config, input_ids
