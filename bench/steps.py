"""Single steps of a generation: before its first one, or anywhere in it."""

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import dkv
from dkv.bench.options import Options
from dkv.canvas import Canvas, slots_of
from dkv.passes import Pass
from dkv.randomness import Randomness
from dkv.sampler import Sampler
from dkv.schedule import Step


def synchronise(device: torch.device) -> None:
    """Wait for what was sent to a GPU, so that a clock read next counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of a call on a device, and its result."""
    synchronise(device)
    begin = time.perf_counter()
    result = call()
    synchronise(device)
    return time.perf_counter() - begin, result


def start(options: Options, settings: dict[str, Any], new: int) -> tuple[Sampler, list[Step]]:
    """A generation before its first step, as `dkv.generate` begins it, and its schedule.

    Raises:
        ValueError: the canvas is longer than the model allows, or a setting is impossible.
    """
    spec, ids = options.model.spec, options.prompts()
    if options.prompt + new > spec.max_positions:
        raise ValueError(
            f"prompt ({options.prompt}) and new slots ({new}) need {options.prompt + new} positions, the model has "
            f"{spec.max_positions}: give a shorter prompt"
        )
    # Dream's own schedule decodes nothing in its first step.
    config = dkv.DiffusionConfig(max_new_tokens=new, schedule="blocks", seed=0, **settings)
    config.cache.check(spec.shifted)
    real, rows = torch.ones_like(ids, dtype=torch.bool), len(ids)
    canvas = Canvas.after_prompts(ids, real, [new] * rows, spec.mask_token_id)
    sampler = Sampler(options.model, canvas, config, Randomness([0] * rows, canvas), spec.mask_token_id)
    return sampler, config.plan(spec.shifted)


def skip(sampler: Sampler, steps: int) -> None:
    """Bring the canvas to where it is after so many steps, from left to right and without computing tokens."""
    canvas, progress = sampler.canvas, sampler.progress
    for part in (steps - 1, 1):
        # Only what the last step decoded is fresh.
        count = 0
        for _ in range(part):
            step = progress.begin()[0]
            progress.advance(np.full_like(progress.masked, step.count))
            count += step.count
        slots = slots_of(canvas.masked, count, canvas.size)
        canvas.commit(slots, torch.ones_like(slots, dtype=torch.bool))


class HalfWay:
    """A generation with half of its slots filled, whose next step can be taken again and again.

    Args:
        options: the model and the canvas.
        settings: of `dkv.generate`; their policy says what is computed.
        cached: go on to a step that is not full, if there is one.
    """

    def __init__(self, options: Options, settings: dict[str, Any], cached: bool = False):
        self.sampler, plan = start(options, settings, options.new)
        self.sampler.run()
        sampler, canvas = self.sampler, self.sampler.canvas
        half = max(len(plan) // 2, 1)
        later = (at for at in range(half, len(plan)) if not sampler.policy.full(plan[at], bool(sampler.shifted)))
        skip(sampler, (next(later, half) if cached else half) - 1)
        self.state = (canvas.tokens.clone(), canvas.masked, canvas.fresh, copy.deepcopy(sampler.progress))

    def take(self) -> Pass | None:
        """Take the step."""
        return self.sampler.run()

    def back(self) -> None:
        """Go back to before the step."""
        sampler, canvas = self.sampler, self.sampler.canvas
        tokens, canvas.masked, canvas.fresh, progress = self.state
        canvas.tokens.copy_(tokens)
        sampler.progress = copy.deepcopy(progress)
