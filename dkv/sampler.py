"""One denoising step: plan, recompute the active slots, choose tokens, commit."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dkv import kernels
from dkv.buffer import KVBuffer
from dkv.canvas import Canvas, column, mask_of, slots_of
from dkv.choosing import Chooser, LogitsProcessor
from dkv.config import DiffusionConfig
from dkv.guidance import guided, twice, with_and_without_text
from dkv.kernels.reference import shares
from dkv.output import Stats
from dkv.passes import Pass
from dkv.policy import Active, View
from dkv.progress import Progress
from dkv.ragged import Ragged
from dkv.randomness import Randomness
from dkv.schedule import Step
from dkv.selection import confident_counts, plan_slots

# The entries of a row in a pass are filled up to a multiple of this. Otherwise every step would have another shape,
# and oneDNN compiles every product anew for a shape that it has not met; and products of other numbers of rows
# round differently.
MULTIPLE = 4


def filled_up(counts: np.ndarray) -> list[int]:
    """Each of `counts` raised to a multiple of `MULTIPLE`."""
    return (-(-counts // MULTIPLE) * MULTIPLE).tolist()


class Sampler:
    """The state of one generation. Nothing is kept on the model, so several may run at once.

    How many slots are masked or fresh follows from the schedule and is counted on the host: a step
    with fixed counts reads nothing back from the device.

    Args:
        model: from `dkv.load` or `dkv.wrap`.
        canvas: the rows, which leave it one by one (`keep`).
        config: settings, checked.
        randomness: the noise of the rows.
        mask_id: id of a slot without a token.
        processor: changes logits, as `LogitsProcessor` of transformers.
    """

    def __init__(
        self, model: Any, canvas: Canvas, config: DiffusionConfig, randomness: Randomness, mask_id: int,
        processor: LogitsProcessor | None = None,
    ):  # fmt: skip
        self.model, self.canvas, self.config, self.randomness, self.mask_id = model, canvas, config, randomness, mask_id
        self.policy, self.shifted, self.savings = config.cache, int(model.spec.shifted), config.savings
        self.by_chance, self.dynamic = config.confidence == "random", config.is_dynamic
        self.branches = 2 if config.cfg_scale else 1
        rows = len(canvas.tokens)
        self.buffer = KVBuffer(rows * self.branches, max(canvas.size, 1), rotated=self.savings.rotated_keys)
        self.workspace = kernels.Workspace()
        self.choose = Chooser(model, config, mask_id, self.workspace, processor)
        plans = [config.plan(bool(self.shifted), row, len(fill)) for row, fill in enumerate(canvas.to_fill)]
        self.progress = Progress(plans, [len(fill) for fill in canvas.to_fill])
        self.stats = Stats()
        self.order = torch.zeros(canvas.masked.shape, device=canvas.tokens.device)
        # The confidence of every slot when it was last computed: what Greedy plans by.
        self.remembered = torch.full_like(self.order, -torch.inf)
        # Slots whose keys and values were computed when their token was known, and those taken over from a buffer.
        self.seen = torch.zeros_like(canvas.masked)
        self.spared: Tensor | None = None
        self.invalid = torch.zeros((), dtype=torch.bool, device=canvas.tokens.device)

    def run(self) -> Pass | None:
        """Carry out a step of every row: the canvas holds its tokens afterwards. None: there was nothing to compute."""
        canvas, progress = self.canvas, self.progress
        steps = progress.begin()
        full = np.array([self.policy.full(step, bool(self.shifted)) for step in steps])
        if full.any():
            self.check()
        start, stop = (column([getattr(step, at) for step in steps], canvas.tokens.device) for at in ("start", "stop"))
        open_, quota = canvas.masked & canvas.span(start, stop), progress.quota(self.dynamic)
        planned, counts = self._plan(steps, open_, full, quota)
        active = self._active(steps, planned, counts, full)
        nothing = np.zeros_like(quota)
        if not active.counts.any():
            self._commit_nothing(nothing)
            return None
        slots, scored = self._scored(open_, planned, counts, active, full, quota)
        done = self._pass(active, full.all() and self.spared is None, slots, scored)
        if not scored.total:
            self._commit_nothing(nothing)
            return done
        eligible = open_
        if planned is not None:
            chosen = mask_of(planned, open_)
            eligible = chosen if self.by_chance else torch.where(column(full.tolist(), open_.device), open_, chosen)
        token, confidence = self._choose(done, steps)
        self._commit(steps, quota, slots, token, confidence, eligible)
        return replace(done, confidence=confidence)

    def check(self) -> None:
        """Raise ValueError if any logits so far were not numbers. Reads one value back."""
        if not bool(self.invalid):
            return
        suspects = [
            f"cfg_scale={self.config.cfg_scale}, which multiplies them" if self.config.cfg_scale else "",
            "the logits_processor, which changes them" if self.choose.processor is not None else "",
            "the weights, and the dtype (float16 overflows where bfloat16 and float32 do not)",
        ]
        raise ValueError(
            "the model's logits hold NaN or infinity, or no id that may be chosen: check "
            + ", then ".join(filter(None, suspects))
        )

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Go on with these rows alone; returns the order they have now."""
        # Rows that need not change places stay, as their keys and values would have to be moved.
        later = [row for row in rows if row >= len(rows)]
        order = [row if row in rows else later.pop() for row in range(len(rows))]
        self.buffer.keep([row * self.branches + i for row in order for i in range(self.branches)])
        for part in (self.canvas, self.progress, self.randomness):
            part.keep(order)
        for name in ("order", "remembered", "seen", "spared"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, x[order])
        return order

    def _plan(
        self, steps: list[Step], open_: Tensor, full: np.ndarray, quota: np.ndarray
    ) -> tuple[Tensor | None, np.ndarray]:
        """The slots to decode in their order, int64 [B, n], where they are known before the pass; and how many."""
        if self.by_chance:
            per_block = self.policy.plans and steps[0].count is not None
            renewed = [step.in_block == 0 or not per_block for step in steps]
            if any(renewed):
                drawn = self.randomness.order([step.index for step in steps])
                self.order = torch.where(column(renewed, open_.device), drawn, self.order)
            if steps[0].count is None:
                chance = column([step.probability for step in steps], open_.device)
                drawn = open_ & (self.order < chance)
                counts = drawn.sum(1).cpu().numpy()
                return slots_of(drawn, int(counts.max()), self.canvas.size), counts
            return plan_slots(self.order, open_, quota), quota
        if not self.policy.plans or full.all():
            return None, np.zeros_like(quota)
        ranked = self._score(self.remembered, steps)
        if self.dynamic:
            least = column(quota.tolist(), open_.device).flatten()
            quota = confident_counts(self.remembered, open_, least, self.config).cpu().numpy()
        return plan_slots(ranked, open_, quota), quota

    def _active(self, steps: list[Step], planned: Tensor | None, counts: np.ndarray, full: np.ndarray) -> Active:
        canvas, progress = self.canvas, self.progress
        everything = Active(canvas.everywhere, canvas.row_lengths)
        if self.spared is not None:
            first = [step.index < self.policy.first_passes(bool(self.shifted)) for step in steps]
            self.spared = self.spared & column(first, canvas.tokens.device)
            rest = everything.mask & ~self.spared
            everything = Active(rest, rest.sum(1).cpu().numpy())
            if not any(first):
                self.spared = None
        if full.all():
            return everything
        view = View(
            canvas, steps, planned, progress.masked, progress.open, progress.fresh, counts, bool(self.shifted)
        )  # fmt: skip
        active = self.policy.active(view)
        if self.dynamic or not self.savings.host_counts:
            active = Active(active.mask, active.mask.sum(1).cpu().numpy())
        active = active.where(full.tolist(), everything)
        return Active(active.mask, np.minimum(active.counts, canvas.row_lengths))

    def _scored(
        self, open_: Tensor, planned: Tensor | None, planned_counts: np.ndarray, active: Active, full: np.ndarray,
        quota: np.ndarray,
    ) -> tuple[Tensor, Ragged]:  # fmt: skip
        """The slots whose logits matter now, ascending, int64 [B, R], filled up with S; and how many."""
        counts = self.progress.open
        if planned is not None and self.by_chance:
            open_, counts = mask_of(planned, open_), planned_counts
        elif planned is not None:
            # The window is scored too: its confidences are what the next plans are made of.
            reached = active.mask
            if self.shifted:
                reached = torch.cat((reached[:, :1], reached[:, :-1]), 1)
            reachable = np.where(active.counts > 0, active.counts + self.shifted, 0)
            open_, counts = open_ & reached, np.minimum(counts, reachable)
        elif not self.policy.plans and not quota.all():
            counts = np.where(quota == 0, 0, counts)
            open_ = open_ & column((quota > 0).tolist(), open_.device)
        scored = Ragged(filled_up(counts), open_.device)
        return slots_of(open_, scored.width, self.canvas.size), scored

    def _pass(self, active: Active, full: bool, slots: Tensor, scored: Ragged) -> Pass:
        """Send the active slots through the model, for the hidden states that predict `slots`."""
        canvas, size, config = self.canvas, self.canvas.size, self.config
        source = torch.minimum((slots - self.shifted).clamp(min=0), canvas.lengths - 1)
        counts, scored_counts = filled_up(active.counts), scored.counts
        positions = slots_of(active.mask, max(counts), size)
        place = source if full else (active.mask.cumsum(1) - 1).gather(1, source).clamp_(min=0)
        every_row = config.output_logits or not self.savings.needed_rows
        inputs = (canvas.tokens.gather(1, positions), positions, canvas.key_ranges, None if every_row else place)
        if self.branches == 2:
            tokens = with_and_without_text(inputs[0], positions, canvas, self.mask_id)
            inputs = (tokens, *map(twice, inputs[1:]))
            counts, scored_counts = (np.repeat(x, 2).tolist() for x in (counts, scored_counts))
        tokens, passed, key_ranges, rows = inputs
        hidden = self.model.step(
            tokens, passed, self.buffer, key_ranges=key_ranges, rows=rows, ragged=Ragged(counts, slots.device),
            ragged_rows=None if every_row else Ragged(scored_counts, slots.device), workspace=self.workspace,
        )  # fmt: skip
        if self.branches == 2:
            hidden = guided(hidden, config.cfg_scale)
        self.seen = self.seen | (active.mask & ~canvas.masked)
        done = Pass(active, bool(full), positions, hidden, place, every_row, slots, scored)
        self.stats.passes += 1
        self.stats.full_passes += done.full
        self.stats.computed_slots += self.branches * done.computed
        self.stats.total_slots += self.branches * int(canvas.row_lengths.sum())
        return done

    def _choose(self, done: Pass, steps: list[Step]) -> tuple[Tensor, Tensor]:
        """Token and log-confidence for each of the scored slots, [B, R]."""
        hidden, slots, layout = done.hidden, done.slots, done.scored
        all_rows = not self.savings.needed_rows
        if all_rows:
            slots, layout = done.positions + self.shifted, Ragged([hidden.shape[1]] * len(hidden), slots.device)
        elif done.every_row:
            hidden = kernels.gather_rows(hidden, done.place, validate=False)
        keys = None
        if self.config.temperature > 0:
            keys = layout.flat(self.randomness.token_keys(slots, [step.index for step in steps]))
        found = self.choose(layout.flat(hidden), keys, layout.counts, self.canvas.texts)
        token, confidence = (layout.padded(x) for x in found)
        if all_rows:
            token, confidence = token.gather(1, done.place), confidence.gather(1, done.place)
        self.invalid |= confidence.isnan().any()
        return token, confidence

    def _score(self, confidence: Tensor, steps: list[Step], slots: Tensor | None = None) -> Tensor:
        """What slots are ranked by: their confidence, or a draw that favours confident ones.

        With a `selection_temperature` T slots are drawn without replacement with weights
        exp(confidence / T), confidence being a probability, a margin or a negative entropy: what
        Dream's `alg_temp` is meant to do (its published code raises).
        """
        heat = self.config.selection_temperature
        if heat == 0:
            return confidence
        noise = self.randomness.selection([step.index for step in steps])
        if slots is not None:
            noise = noise.gather(1, slots.clamp(max=noise.shape[1] - 1))
        plain = confidence if self.config.confidence == "entropy" else confidence.exp()
        own, noisy = shares(heat, plain.dtype)
        score = plain * own + noise * noisy
        return score.masked_fill(confidence == -torch.inf, -torch.inf) if self.config.confidence_eos_eot_inf else score

    def _commit(
        self, steps: list[Step], quota: np.ndarray, slots: Tensor, token: Tensor, confidence: Tensor, eligible: Tensor
    ) -> None:
        """Write the tokens of the most confident eligible slots."""
        canvas = self.canvas
        spare = torch.zeros_like(eligible[:, :1])
        allowed = torch.cat((eligible, spare), 1).gather(1, slots)
        count = column(quota.tolist(), slots.device).flatten()
        if steps[0].count is None:
            count = torch.full_like(count, canvas.size)
        elif self.dynamic:
            count = confident_counts(confidence, allowed, count, self.config)
        committed = kernels.commit_(
            canvas.tokens, token, self._score(confidence, steps, slots), allowed, count, positions=slots,
            validate=False,
        )  # fmt: skip
        canvas.commit(slots, committed)
        if self.policy.plans and not self.by_chance:
            wide = torch.cat((self.remembered, self.remembered[:, :1]), 1)
            self.remembered = wide.scatter_(1, slots, confidence.to(wide.dtype))[:, :-1]
        # Only chance and confidence make the counts a question to the device.
        asked = self.dynamic or steps[0].count is None
        self.progress.advance(canvas.fresh.sum(1).cpu().numpy() if asked else quota)

    def _commit_nothing(self, nothing: np.ndarray) -> None:
        self.canvas.fresh = torch.zeros_like(self.canvas.fresh)
        self.progress.advance(nothing)
