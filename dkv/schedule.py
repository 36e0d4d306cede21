"""How many slots each step decodes: known on the host before the first pass."""

from dataclasses import dataclass

import torch


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
