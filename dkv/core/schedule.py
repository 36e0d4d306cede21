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
        first, end: of a block-causal model: the first slot of its block, and the one after the last that the pass sees.
        part, part_end: of such a model: the same of the part of the block that is open.
        least: of such a model: slots to decode at least, where confidence decides, whatever was decoded before.
    """

    index: int
    block: int
    in_block: int
    start: int
    stop: int
    count: int | None
    left: int
    probability: float = 0.0
    first: int = 0
    end: int | None = None
    part: int = 0
    part_end: int = 0
    least: int = 1


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


def shares(steps: int, blocks: int, rounded: bool) -> list[int]:
    """How many of all steps every block takes: the first ones those that are left over, or `rounded` all of them."""
    base, more = divmod(steps, blocks)
    return [base + (bool(more) if rounded else block < more) for block in range(blocks)]


def quotas(slots: int, steps: int, rounded: bool = False) -> list[int]:
    """How many of a block's slots each step decodes: at least one, so there may be fewer steps.

    Equal shares, of which the first ones are larger by one (LLaDA, `get_num_transfer_tokens`); or `rounded`, each
    step its share of what is left to the nearest whole number, of halves the even one, in the float32 of the published
    code (dllm, linear schedule), whose rounding decides.
    """
    if not rounded:
        base, more = divmod(slots, steps)
        return [base + (i < more) for i in range(min(slots, steps))]
    found, left = [], slots
    for j in range(steps, 0, -1):
        before, now = (1 - torch.tensor(time, dtype=torch.float32) for time in ((j - 1) / steps, j / steps))
        kept = (1 - before) / (1 - now)
        count = min(round(left * (1 - kept.double()).item()), left)
        left -= count
        found += [count] if count else []
    return found


def block_schedule(new_tokens: int, steps: int, block_length: int, rounded: bool = False) -> list[Step]:
    """LLaDA's schedule: blocks from left to right, and equal shares of a block in each of its steps.

    Where the shares are not whole, the first steps decode one slot more (published code,
    `get_num_transfer_tokens`). The published code needs lengths and steps to be multiples; here the
    last block may be shorter, and the first blocks take the steps that are left over. A block never
    has more steps than slots.

    Args:
        new_tokens: slots to decode.
        steps: in total, at least one per block.
        block_length: slots of a block.
        rounded: as for `quotas`.

    Raises:
        ValueError: fewer steps than blocks.
    """
    check_steps(new_tokens, steps, block_length)
    starts = range(0, new_tokens, block_length)
    plan: list[Step] = []
    for block, (start, share) in enumerate(zip(starts, shares(steps, len(starts) or 1, rounded), strict=False)):
        stop = min(start + block_length, new_tokens)
        left = stop - start
        for i, count in enumerate(quotas(left, share, rounded)):
            left -= count
            plan.append(Step(len(plan), block, i, start, stop, count, left))
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


# What a step of a block-causal model has beside the fields of all.
REACH = ("first", "end", "part", "part_end", "least")


class Now:
    """Steps as columns [..., 1] of int64: the fields of `Step`, and

    Attributes:
        next_block: number of the step that begins the next block; of the last block, the number of steps.
        full: whether every slot is computed, 0 or 1.
        chance: float32, `Step.probability`; None where counts are fixed.
        moved: int64, slots by which the first mask went on in the last step; None where blocks stay in their places.
        first, end, part, part_end, least: of `Step`, in a block-causal model; else None.
    """

    def __init__(
        self, numbers: Tensor, chance: Tensor | None, moved: Tensor | None = None, reach: Tensor | None = None
    ):
        self.numbers, self.chance, self.moved = numbers, chance, moved
        columns = (None,) * len(REACH) if reach is None else reach.split(1, -1)
        self.first, self.end, self.part, self.part_end, self.least = columns
        for name, column in zip(FIELDS, numbers.split(1, -1), strict=True):
            setattr(self, name, column)


class Timetable:
    """The schedules of all rows as one tensor on the device, and the step at which every row is.

    Args:
        plans: by row, its steps.
        device: of the tensors.
        full: (steps) -> bool, whether each of them computes every slot; None: none does.
        room: steps that the table has at least.

    Attributes:
        table: int64 [B, steps, fields].
        at: int64 [B], the step that every row is about to take, changed in place; `current` [B, fields] is that step.
        by_chance: whether it is drawn how many slots a step fills.
        most: steps of the longest plan that there is room for.
    """

    def __init__(
        self,
        plans: Sequence[Sequence[Step]],
        device: torch.device,
        full: Callable[[Now], Tensor] | None = None,
        room: int = 0,
    ):
        self.most = longest = max(1, room, *map(len, plans))
        table = torch.zeros(len(plans), longest, len(FIELDS), dtype=torch.int64)
        chance = torch.zeros(len(plans), longest)
        reach = torch.zeros(len(plans), longest, len(REACH), dtype=torch.int64)
        in_blocks = any(plan and plan[0].end is not None for plan in plans)
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
            if in_blocks:
                reach[row, : len(plan)] = torch.tensor([[getattr(step, name) for name in REACH] for step in plan])
        if full is not None:
            table[..., FIELDS.index("full")] = full(Now(table, None)).squeeze(-1)
        self.by_chance = any(step.count is None for plan in plans for step in plan)
        self.at = torch.zeros(len(plans), dtype=torch.int64, device=device)
        self.table, self._chance = table.to(device), chance.to(device) if self.by_chance else None
        self._reach = reach.to(device) if in_blocks else None
        self.current = self.table[:, 0].clone()

    def follow(self, masked: Tensor, rank: Tensor) -> None:
        """Make the next steps from what is masked, bool [B, S]; here all of them are told beforehand."""

    def go_to(self, at: Tensor) -> None:
        """Let every row take the step with this number next, int64 [B, 1]."""
        self.at.copy_(at.squeeze(1))
        self.current.copy_(self.table.gather(1, at[..., None].expand(-1, 1, self.table.shape[2])).squeeze(1))

    def now(self) -> Now:
        """The steps that come next."""
        chance, reach = self._chance, self._reach
        if chance is not None:
            chance = chance.gather(1, self.at[:, None])
        if reach is not None:
            reach = reach.gather(1, self.at[:, None, None].expand(-1, 1, reach.shape[2])).squeeze(1)
        return Now(self.current, chance, reach=reach)

    def steps(self, row: int) -> Now:
        """All steps of a row, as columns [T, 1]."""
        chance, reach = (None if x is None else x[row] for x in (self._chance, self._reach))
        return Now(self.table[row], None if chance is None else chance[:, None], reach=reach)
