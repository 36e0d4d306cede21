"""The policies of dKV-Cache (Ma et al. 2025): rules for the slots that a pass recomputes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dkv.core.schedule import Now
from dkv.core.sequences import mask_of, slots_of
from dkv.core.validation import whole
from dkv.kernels.plan.op import WINDOW
from dkv.policies.base import Policy, View, sources


@dataclass(frozen=True)
class NoCache(Policy):
    """Every slot in every step: plain decoding."""

    name: ClassVar[str] = "none"
    in_blocks: ClassVar[bool] = True

    def full(self, now: Now, shifted: bool) -> Tensor:
        return now.index >= 0

    def active(self, view: View) -> Tensor:
        return view.rows.everywhere


@dataclass(frozen=True)
class DecodeCache(Policy):
    """dKV-Cache-Decode: masked slots, and those decoded last, whose K and V settle one step late.

    Args:
        refresh: every so many steps, counted from the start of the block, everything is recomputed
            (paper: 8 for LLaDA, 4 for Dream); 1 is plain decoding, 0 or None never refreshes.
        warmup: full passes at the start of a block. The published code makes 2 for LLaDA (its first
            pass stores nothing) and 1 for Dream; None stands for these. 1 saves a full pass per
            block of LLaDA and caches the prompt as it was seen with one more mask.
        shift_rule: for shifted models, when a slot may be cached: "un" once its output is no longer
            needed (published default; its own token may still be a mask then, and stay stale until
            the next refresh), "un_right" once also its own token is known, "right" once its own
            token is known, though its output may still be needed (only with refresh 1).
    """

    name: ClassVar[str] = "decode"
    in_blocks: ClassVar[bool] = True
    refresh: int | None = 8
    warmup: int | None = None
    shift_rule: str = "un"

    def __post_init__(self):
        self._take(whole, "refresh", 0, optional=True)
        self._take(whole, "warmup", 1, optional=True)
        if self.shift_rule not in ("un", "un_right", "right"):
            raise ValueError(f'shift_rule must be "un", "un_right" or "right", got {self.shift_rule!r}')

    def check(self, shifted: bool) -> None:
        if shifted and self.shift_rule == "right" and self.refresh != 1:
            raise ValueError(
                'shift_rule "right" caches a slot while its output is still needed for the next one, which then '
                'has no logits; it is exact with refresh=1 only. Use "un" or "un_right"'
            )

    def first_passes(self, shifted: bool) -> int:
        return self.warmup if self.warmup is not None else 1 if shifted else 2

    def full(self, now: Now, shifted: bool) -> Tensor:
        first = now.in_block < self.first_passes(shifted)
        return first | (now.in_block % self.refresh == 0) if self.refresh else first

    def active(self, view: View) -> Tensor:
        unsettled = view.unsettled
        if not view.shifted:
            return unsettled
        last = torch.arange(view.rows.size, device=unsettled.device) == view.rows.lengths - 1
        if self.shift_rule == "un":
            # The published rule takes the last slot as cached from the second pass on.
            return sources(unsettled) | (last & (view.now.in_block == 1))
        # Nothing is predicted by the last slot: it is settled when the one before it is.
        return unsettled | sources(unsettled) | (last & unsettled.roll(1, 1))


def _beyond_prompt(view: View) -> Tensor:
    """All slots from the first one to fill; in a shifted model also the one whose output predicts it."""
    return view.with_sources(view.from_on(0))


@dataclass(frozen=True)
class PrefillCache(Policy):
    """dKV-Cache-Prefill: what stands before the first slot to fill is computed once, the rest in every step."""

    name: ClassVar[str] = "prefill"

    def full(self, now: Now, shifted: bool) -> Tensor:
        return now.index == 0

    def active(self, view: View) -> Tensor:
        return _beyond_prompt(view)


@dataclass(frozen=True)
class PrefillDecodeCache(DecodeCache):
    """dKV-Cache-PD: as `DecodeCache`, but a refresh leaves the prompt alone.

    The arguments are those of `DecodeCache`; `refresh=1` is `PrefillCache`.
    """

    name: ClassVar[str] = "pd"
    in_blocks: ClassVar[bool] = False

    def full(self, now: Now, shifted: bool) -> Tensor:
        return now.index == 0

    def active(self, view: View) -> Tensor:
        return torch.where(super().full(view.now, view.shifted), _beyond_prompt(view), super().active(view))


@dataclass(frozen=True)
class GreedyCache(Policy):
    """dKV-Cache-Greedy: the slots decoded last, the ones to be decoded now, and a window of masks.

    Its cost does not grow with the number of masked slots. The slots to decode must be known before
    the pass: with the "random" confidence rule their order is drawn at the start of each block, as
    published. With another rule (ours) a full pass decodes its own most confident slots, and a
    cached pass those that were most confident when they were last computed.

    Args:
        refresh: every so many steps of a block, from its first, everything is recomputed (paper: 2);
            0 or None: only the first.
        window: further slots per slot of the center: the nearest that are still masked, left before right, as
            published (the paper's text takes the slots at most window / 2 away, masked or not).
        window_center: around the slots decoded "next" (published code) or "last" (the paper's choice).
    """

    name: ClassVar[str] = "greedy"
    plans: ClassVar[bool] = True
    refresh: int | None = 2
    window: int = 4
    window_center: str = "next"

    def __post_init__(self):
        self._take(whole, "refresh", 0, optional=True)
        self._take(whole, "window", 0)
        if self.window_center not in ("next", "last"):
            raise ValueError(f'window_center must be "next" or "last", got {self.window_center!r}')

    def full(self, now: Now, shifted: bool) -> Tensor:
        first = now.in_block == 0
        return first | (now.in_block % self.refresh == 0) if self.refresh else first

    def active(self, view: View) -> Tensor:
        rows = view.rows
        planned = mask_of(view.planned, rows.masked)
        chosen = rows.fresh | view.with_sources(planned)
        if self.window == 0:
            return chosen
        centers = view.planned
        if self.window_center == "last":
            centers = slots_of(rows.fresh, view.planned.shape[1], rows.size)
        return WINDOW(chosen, rows.masked, centers, self.window)
