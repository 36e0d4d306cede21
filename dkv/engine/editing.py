"""Editing of tokens that were filled already (LLaDA2.1): a block goes on until nothing in it changes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dkv.core.schedule import Now
from dkv.core.sequences import Sequences
from dkv.engine.config import DiffusionConfig
from dkv.engine.ending import among
from dkv.engine.stages import Choice, Packed, StepPlan


class Before(NamedTuple):
    """The state of a block before a step: the step, which slots had a token, and which rows had masks in the block."""

    now: Now
    known: Tensor
    had_masks: Tensor


class Editing:
    """What a pass changes of the slots of its block that were filled before it.

    A slot takes the best token of the pass where that is another one, and surer than the threshold. A block without
    masks is passed over until nothing changes, `post_steps` times at most. Rows have one slot more than they fill, in a
    block of its own: its mask stands for the row's not being finished, as known slots may still change.

    Args:
        config: settings; `edit_threshold` is not None.
        rows: whose timetable has one step for each block.
        eos: ids that end a row, looked for where a block is finished, as an edit may undo one; None: there are none.
    """

    def __init__(self, config: DiffusionConfig, rows: Sequences, eos: Tensor | None):
        self._rows, self._eos, self._most = rows, eos, config.post_steps
        self._bound = math.log(config.edit_threshold) if config.edit_threshold else -math.inf
        self._last = rows.rank.amax(1, keepdim=True)
        # Passes over the current block without a mask, the one to come included.
        self.post = torch.zeros_like(rows.lengths)

    def scored(self, now: Now) -> Tensor:
        """bool [B, S]: the slots of the block that a token is chosen for, filled ones included."""
        return (self._rows.rank >= now.start) & (self._rows.rank < now.stop)

    def before(self) -> Before:
        """What has to be known of a block before a step changes it."""
        rows = self._rows
        now = Now(rows.timetable.current.clone(), None)
        return Before(now, ~rows.masked, rows.open(now).any(1, keepdim=True))

    def after(self, before: Before, plan: StepPlan, choice: Choice, packed: Packed, pad: int) -> Tensor:
        """Edit, and stay in the block or go on; returns the slots that an end cuts off, bool [B, S]."""
        rows, table, now = self._rows, self._rows.timetable, before.now
        edited = self._edit(before.known, plan, choice, packed)
        masks = (rows.masked & self.scored(now)).any(1, keepdim=True)
        self.post.copy_(torch.where(masks, self.post, self.post + 1))
        stay = masks | ((before.had_masks | edited) & (self.post <= self._most))
        self.post.masked_fill_(~stay, 0)
        table.go_to(torch.where(stay, now.index, table.at[:, None]))
        finished = ~stay & (table.now().start == self._last)
        rows.masked &= ~(finished & (rows.rank == self._last))
        goes_on = stay | ~plan.active.any(1, keepdim=True)
        return rows.cut(self._ends(now).masked_fill(goes_on, rows.size + 1), pad)

    def _edit(self, known: Tensor, plan: StepPlan, choice: Choice, packed: Packed) -> Tensor:
        """Write the edits of a step; `known` bool [B, S] had a token before it. Returns which rows have any, [B, 1]."""
        tokens, at = self._rows.tokens, packed.scored_rows * (self._rows.size + 1) + packed.slots
        token = tokens.flatten().scatter(0, at, choice.token).view_as(tokens)[:, :-1]
        sure = torch.full(tokens.shape, -torch.inf, device=tokens.device)
        sure.view(-1).scatter_(0, at, choice.confidence.float())
        changed = plan.scored & known & (token != tokens[:, :-1]) & (sure[:, :-1] > self._bound)
        tokens[:, :-1].copy_(torch.where(changed, token, tokens[:, :-1]))
        return changed.any(1, keepdim=True)

    def _ends(self, now: Now) -> Tensor:
        """int64 [B, 1]: the length of a row that ends with the block or before it, else more than it has."""
        rows = self._rows
        never = torch.full_like(rows.lengths, rows.size + 1)
        if self._eos is None:
            return never
        ends = among(rows.tokens[:, :-1], self._eos) & (rows.rank >= 0) & (rows.rank < now.stop)
        behind = torch.arange(1, rows.size + 1, device=ends.device)
        return torch.where(ends, behind, rows.size + 1).amin(1, keepdim=True)
