"""How many slots each step fills: built once, on the host, and kept as a table on the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dkv.kernels.plan.reference import FIELDS


@dataclass(frozen=True)
class Step:
    """One pass and the decoding after it.

    Attributes:
        index: number of the step, from 0.
        block, in_block: its block, and its number within the block.
        start, stop: the block's slots, counted among the slots to fill of the row.
        count: slots to decode; None when chance decides (`probability`).
        left: slots of the block that have no token after this step, at most.
        probability: of decoding a masked slot, when chance decides.
    """

    index: int
    block: int
    in_block: int
    start: int
    stop: int
    count: int | None
    left: int
    probability: float = 0.0


# Steps in time beyond the slots decode nothing, and each is a pass: what asks for more than this is a slip.
MOST_STEPS = 1 << 16


def check_steps(new_tokens: int, steps: int, block_length: int | None) -> None:
    """Raise ValueError where there are fewer steps than blocks, or far too many of the time schedule (no blocks)."""
    if block_length is None:
        most = max(MOST_STEPS, new_tokens)
        if steps > most:
            raise ValueError(f"steps must be at most {most} in the time schedule, where each is a pass, got {steps}")
        return
    blocks = -(-new_tokens // block_length)
    if steps < blocks:
        raise ValueError(
            f"steps ({steps}) is the total over all blocks and must be at least the number of blocks: "
            f"{new_tokens} new tokens in blocks of {block_length} need {blocks}"
        )


def block_schedule(new_tokens: int, steps: int, block_length: int) -> list[Step]:
    """LLaDA's schedule: blocks from left to right, and equal shares of a block in each of its steps.

    Where the shares are not whole, the first steps decode one slot more (published code,
    `get_num_transfer_tokens`). The published code needs lengths and steps to be multiples; here the
    last block may be shorter, and the first blocks take the steps that are left over. A block never
    has more steps than slots.

    Args:
        new_tokens: slots to decode.
        steps: in total, at least one per block.
        block_length: slots of a block.

    Raises:
        ValueError: fewer steps than blocks.
    """
    check_steps(new_tokens, steps, block_length)
    starts = range(0, new_tokens, block_length)
    plan: list[Step] = []
    for block, start in enumerate(starts):
        stop = min(start + block_length, new_tokens)
        share = steps // len(starts) + (block < steps % len(starts))
        left, (base, extra) = stop - start, divmod(stop - start, share)
        for i in range(min(share, stop - start)):
            left -= base + (i < extra)
            plan.append(Step(len(plan), block, i, start, stop, base + (i < extra), left))
    return plan


def time_schedule(new_tokens: int, steps: int, eps: float, by_chance: bool) -> list[Step]:
    """Dream's schedule: one block, times from 1 down to `eps`, and the masks that a time step frees.

    Counts are truncated in float32 as in the published code: with as many steps as slots the first
    step decodes nothing and the last one two.

    Args:
        new_tokens: slots to decode.
        steps: time steps, which may exceed the slots.
        eps: the last time, in (0, 1).
        by_chance: every masked slot is decoded with the probability of the step (Dream's "origin").

    Raises:
        ValueError: more than `MOST_STEPS`, and more than slots.
    """
    check_steps(new_tokens, steps, None)
    times = torch.linspace(1, eps, steps + 1)
    plan, left = [], torch.tensor(float(new_tokens))
    for i in range(steps):
        last = i == steps - 1
        share = torch.tensor(1.0) if last else 1 - times[i + 1] / times[i]
        count = int(left * share)
        left = left - count
        plan.append(Step(i, 0, i, 0, new_tokens, None if by_chance else count, int(left), share.item()))
    return plan


class Now:
    """Steps as columns [..., 1] of int64: the fields of `Step`, and

    Attributes:
        next_block: number of the step that begins the next block; of the last block, the number of steps.
        full: whether every slot is computed, 0 or 1.
        chance: float32, `Step.probability`; None where counts are fixed.
        moved: int64, slots by which the first mask went on in the last step; None where blocks stay in their places.
    """

    def __init__(self, numbers: Tensor, chance: Tensor | None, moved: Tensor | None = None):
        self.numbers, self.chance, self.moved = numbers, chance, moved
        for name, column in zip(FIELDS, numbers.split(1, -1), strict=True):
            setattr(self, name, column)


class Timetable:
    """The schedules of all rows as one tensor on the device, and the step at which every row is.

    Args:
        plans: by row, its steps.
        device: of the tensors.
        full: (steps) -> bool, whether each of them computes every slot; None: none does.

    Attributes:
        table: int64 [B, steps, fields].
        at: int64 [B], the step that every row is about to take, changed in place; `current` [B, fields] is that step.
        by_chance: whether it is drawn how many slots a step fills.
    """

    def __init__(
        self, plans: Sequence[Sequence[Step]], device: torch.device, full: Callable[[Now], Tensor] | None = None
    ):
        longest = max(map(len, plans), default=0) or 1
        table = torch.zeros(len(plans), longest, len(FIELDS), dtype=torch.int64)
        chance = torch.zeros(len(plans), longest)
        for row, plan in enumerate(plans):
            if not plan:
                continue
            following, after = len(plan), []
            for step in reversed(plan):
                after.append(following)
                following = step.index if step.in_block == 0 else following
            for place, name in enumerate(FIELDS):
                if name not in ("next_block", "full"):
                    table[row, : len(plan), place] = torch.tensor([getattr(step, name) for step in plan])
            table[row, : len(plan), FIELDS.index("next_block")] = torch.tensor(after[::-1])
            chance[row, : len(plan)] = torch.tensor([step.probability for step in plan])
        if full is not None:
            table[..., FIELDS.index("full")] = full(Now(table, None)).squeeze(-1)
        self.by_chance = any(step.count is None for plan in plans for step in plan)
        self.at = torch.zeros(len(plans), dtype=torch.int64, device=device)
        self.table, self._chance = table.to(device), chance.to(device) if self.by_chance else None
        self.current = self.table[:, 0].clone()

    def follow(self, masked: Tensor, rank: Tensor) -> None:
        """Make the next steps from what is masked, bool [B, S]; here all of them are told beforehand."""

    def now(self) -> Now:
        """The steps that come next."""
        return Now(self.current, None if self._chance is None else self._chance.gather(1, self.at[:, None]))

    def steps(self, row: int) -> Now:
        """All steps of a row, as columns [T, 1]."""
        return Now(self.table[row], None if self._chance is None else self._chance[row][:, None])
