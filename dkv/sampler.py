"""One denoising step: plan, recompute the active slots, choose tokens, commit."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dkv import kernels
from dkv.buffer import KVBuffer
from dkv.canvas import Canvas, mask_of, slots_of
from dkv.config import DiffusionConfig
from dkv.output import Stats
from dkv.policies import Active, View
from dkv.randomness import Randomness
from dkv.schedule import Step

LOGITS_AT_A_TIME = 1 << 24
# The rows of a pass are filled up to a multiple of this. Otherwise every step would have another shape, and oneDNN
# compiles every product anew for a shape that it has not met.
MULTIPLE = 4


def filled_up(count: int, most: int) -> int:
    """`count` raised to a multiple of `MULTIPLE`, but to no more than `most`."""
    return min(-(-count // MULTIPLE) * MULTIPLE, most)


@dataclass(frozen=True)
class Pass:
    """What went through the model in a step.

    Attributes:
        active: the slots computed; None for all.
        computed: how many, all rows.
        positions: [B, N] the same, ascending, filled up with S.
        hidden: [B, N, d] if `every_row`, else [B, R, d] at the rows in `place`.
        place: [B, R] which of the N predict the slots that are scored.
        slots, confidence: [B, R] the slots that are scored, filled up with S, and the outcome; None where none was.
    """

    active: Active | None
    computed: int
    positions: Tensor
    hidden: Tensor
    place: Tensor
    every_row: bool
    slots: Tensor
    confidence: Tensor | None = None


class Sampler:
    """The state of one generation. Nothing is kept on the model, so several may run at once.

    How many slots are masked or fresh follows from the schedule and is counted on the host: a step
    with a fixed count reads nothing back from the device.
    """

    def __init__(self, model: Any, canvas: Canvas, config: DiffusionConfig, randomness: Randomness, mask_id: int):
        self.model, self.canvas, self.config, self.randomness = model, canvas, config, randomness
        self.policy, self.shifted, self.savings = config.cache, int(model.spec.shifted), config.savings
        self.by_chance, self.banned = config.confidence == "random", (mask_id,)
        self.buffer = KVBuffer(len(canvas.tokens), max(canvas.size, 1), rotated=self.savings.rotated_keys)
        self.workspace = kernels.Workspace()
        self.key_ranges = canvas.key_ranges
        self.masked_count, self.open_count, self.fresh_count = canvas.new_tokens, 0, 0
        self.stats = Stats()
        self.order: Tensor | None = None
        # The confidence of every slot when it was last computed: what Greedy plans by.
        self.remembered = torch.full(canvas.masked.shape, -torch.inf, device=canvas.tokens.device)
        self.invalid = torch.zeros((), dtype=torch.bool, device=canvas.tokens.device)

    def run(self, step: Step) -> Pass | None:
        """Carry out a step: the canvas holds its tokens afterwards. None: there was nothing to compute."""
        canvas = self.canvas
        if step.in_block == 0:
            self.open_count = step.stop - step.start
        full = self.policy.full(step, bool(self.shifted))
        if full:
            self.check()
        open_ = canvas.masked & canvas.span(step.start, step.stop)
        planned = self._plan(step, open_, full)
        active = None if full else self._active(step, planned)
        if active is not None and active.count == 0:
            canvas.commit(slots_of(open_, 0, canvas.size), open_[:, :0])
            return None
        slots = self._scored(step, open_, planned, active)
        done = self._pass(active, slots)
        if slots.shape[1]:
            eligible = open_ if planned is None else mask_of(planned, open_)
            token, confidence = self._choose(done, slots, step)
            self._commit(step, slots, token, confidence, eligible)
            done = replace(done, confidence=confidence)
        else:
            canvas.commit(slots, slots.bool())
        self._count(step)
        return done

    def check(self) -> None:
        """Raise ValueError if any logits so far were not numbers. Reads one value back."""
        if bool(self.invalid):
            raise ValueError(
                "the model's logits hold NaN or infinity, or no id that may be chosen: check the weights, and the "
                "dtype (float16 overflows where bfloat16 and float32 do not)"
            )

    def _plan(self, step: Step, open_: Tensor, full: bool) -> Tensor | None:
        """The slots to decode in their order, int64 [B, n], where they are known before the pass."""
        if self.by_chance:
            per_block = self.policy.plans and step.count is not None
            if self.order is None or not per_block or step.in_block == 0:
                self.order = self.randomness.order(step.index)
            if step.count is None:
                drawn = open_ & (self.order < step.probability)
                return slots_of(drawn, int(drawn.sum(1).max()), self.canvas.size)
            order = self.order
        elif self.policy.plans and not full:
            order = self._score(self.remembered, step)
        else:
            return None
        lowest = torch.finfo(order.dtype).min
        order = order.clamp(min=lowest).masked_fill(~open_, -torch.inf)
        best, slots = order.sort(dim=1, descending=True, stable=True)
        best, slots = best[:, : step.count], slots[:, : step.count]
        return torch.where(best >= lowest, slots, self.canvas.size)

    def _active(self, step: Step, planned: Tensor | None) -> Active:
        canvas = self.canvas
        view = View(
            step, canvas.masked, canvas.fresh, planned, self.masked_count, self.fresh_count,
            canvas.prompt_lengths, canvas.lengths, canvas.new_tokens, bool(self.shifted),
        )  # fmt: skip
        active = self.policy.active(view)
        count = active.count if self.savings.host_counts else int(active.mask.sum(1).max())
        return Active(active.mask, min(count, canvas.size))

    def _scored(self, step: Step, open_: Tensor, planned: Tensor | None, active: Active | None) -> Tensor:
        """The slots whose logits matter now, ascending, int64 [B, R], filled up with S."""
        if planned is not None and self.by_chance:
            return planned.sort(dim=1).values
        count = self.open_count
        if step.count == 0 and not self.policy.plans:
            count = 0
        if planned is not None:
            # The window is scored too: its confidences are what the next plans are made of.
            reached = active.mask
            if self.shifted:
                reached = torch.cat((reached[:, :1], reached[:, :-1]), 1)
            open_, count = open_ & reached, min(count, active.count + self.shifted)
        return slots_of(open_, filled_up(count, self.canvas.size), self.canvas.size)

    def _pass(self, active: Active | None, slots: Tensor) -> Pass:
        """Send the active slots through the model, for the hidden states that predict `slots`."""
        canvas = self.canvas
        batch, size = canvas.masked.shape
        source = (slots - self.shifted).clamp(0, size - 1)
        if active is None:
            positions, place = torch.arange(size, device=slots.device).expand(batch, size), source
        else:
            positions = slots_of(active.mask, filled_up(active.count, size), size)
            place = (active.mask.cumsum(1) - 1).gather(1, source).clamp_(min=0)
        every_row = self.config.output_logits or not self.savings.needed_rows
        hidden = self.model.step(
            canvas.tokens.gather(1, positions), positions, self.buffer,
            key_ranges=self.key_ranges, rows=None if every_row else place, workspace=self.workspace,
        )  # fmt: skip
        self.stats.passes += 1
        self.stats.full_passes += active is None
        computed = canvas.slots_in_use if active is None else batch * active.count
        self.stats.computed_slots += computed
        self.stats.total_slots += canvas.slots_in_use
        return Pass(active, computed, positions, hidden, place, every_row, slots)

    def _choose(self, done: Pass, slots: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Token and log-confidence for each of `slots`, [B, R]."""
        config, head, hidden, all_rows = self.config, self.model.head, done.hidden, not self.savings.needed_rows
        if all_rows:
            slots = done.positions + self.shifted
        elif done.every_row:
            hidden = kernels.gather_rows(hidden, done.place, validate=False)
        drawn = config.temperature > 0
        how = {
            "rule": "probability" if self.by_chance else config.confidence,
            "temperature": config.temperature,
            # Dream takes filters and confidences from the tempered logits, LLaDA from the raw ones.
            "confidence_temperature": config.temperature if drawn and self.shifted else 1.0,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "seed": self.randomness.seed,
            "row_keys": self.randomness.token_keys(slots, step.index) if drawn else None,
            "banned": self.banned,
            "vocab_limit": config.vocab_limit,
            "validate": False,
        }
        flat = hidden.flatten(0, 1)
        if not self.savings.tail_confidence:
            with kernels.use_backend("reference"):
                token, confidence = kernels.choose_token(head(flat).double(), **how)
        elif type(head) is nn.Linear:
            token, confidence = kernels.choose_token_fused(
                flat, head.weight, head_bias=head.bias, workspace=self.workspace, **how
            )
        elif hasattr(head, "strips"):
            token, confidence = kernels.choose_token_fused(flat, head, workspace=self.workspace, **how)
        else:
            token, confidence = self._choose_in_parts(flat, how.pop("row_keys"), how)
        token, confidence = token.view(slots.shape), confidence.view(slots.shape)
        if all_rows:
            token, confidence = token.gather(1, done.place), confidence.gather(1, done.place)
        self.invalid |= confidence.isnan().any()
        return token, confidence

    def _choose_in_parts(self, hidden: Tensor, row_keys: Tensor | None, how: dict) -> tuple[Tensor, Tensor]:
        """`choose_token` behind a head that is not a plain matrix, a bounded number of logits at a time."""
        rows = max(1, LOGITS_AT_A_TIME // self.model.spec.vocab_size)
        keys = [None] * len(hidden) if row_keys is None else row_keys.split(rows)
        parts = [
            kernels.choose_token(self.model.head(part), row_keys=key, overwrite=True, workspace=self.workspace, **how)
            for part, key in zip(hidden.split(rows), keys, strict=False)
        ]
        token, confidence = zip(*parts, strict=True)
        return torch.cat(token), torch.cat(confidence)

    def _score(self, confidence: Tensor, step: Step, slots: Tensor | None = None) -> Tensor:
        """What slots are ranked by: their confidence, or a draw that favours confident ones.

        With a `selection_temperature` T slots are drawn without replacement with weights
        exp(confidence / T), confidence being a probability, a margin or a negative entropy: what
        Dream's `alg_temp` is meant to do (its published code raises).
        """
        heat = self.config.selection_temperature
        if heat == 0:
            return confidence
        noise = self.randomness.selection(step.index)
        if slots is not None:
            noise = noise.gather(1, slots.clamp(max=noise.shape[1] - 1))
        plain = confidence if self.config.confidence == "entropy" else confidence.exp()
        return plain / heat + noise

    def _commit(self, step: Step, slots: Tensor, token: Tensor, confidence: Tensor, eligible: Tensor) -> None:
        """Write the tokens of the most confident eligible slots."""
        canvas = self.canvas
        spare = torch.zeros_like(eligible[:, :1])
        allowed = torch.cat((eligible, spare), 1).gather(1, slots)
        count = canvas.size if step.count is None else step.count
        committed = kernels.commit_(
            canvas.tokens, token, self._score(confidence, step, slots), allowed,
            torch.full((len(slots),), count, device=slots.device), positions=slots, validate=False,
        )  # fmt: skip
        canvas.commit(slots, committed)
        if self.policy.plans and not self.by_chance:
            wide = torch.cat((self.remembered, self.remembered[:, :1]), 1)
            self.remembered = wide.scatter_(1, slots, confidence.to(wide.dtype))[:, :-1]

    def _count(self, step: Step) -> None:
        """Bring the host's counts up to date; only chance makes them a question to the device."""
        if step.count is None:
            self.masked_count = self.open_count = int(self.canvas.masked.sum(1).max())
            self.fresh_count = int(self.canvas.fresh.sum(1).max())
            return
        self.masked_count -= step.count
        self.open_count -= step.count
        self.fresh_count = step.count
