"""Single steps of a generation: before its first one, or anywhere in it."""

from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

import dkv
from dkv.bench.options import Options
from dkv.bench.timing import timed
from dkv.core.sequences import Sequences
from dkv.engine.engine import Engine, OnStep, StepResult
from dkv.engine.inputs import checked_inputs
from dkv.engine.noise import Noise
from dkv.engine.stages import Choice, Forward, Packed, Shape
from dkv.kernels.attention.op import ATTENTION
from dkv.kernels.common.operation import Operation


def start(options: Options, settings: dict[str, Any], new: int, hooks: Sequence[OnStep] = ()) -> Engine:
    """A generation of `options` before its first step.

    Raises:
        ValueError: the canvas is longer than the model allows, or a setting is impossible.
    """
    most = options.model.spec.max_positions
    if options.prompt + new > most:
        raise ValueError(
            f"prompt ({options.prompt}) and new slots ({new}) need {options.prompt + new} positions, the model has "
            f"{most}: give a shorter prompt"
        )
    return begin(options.model, options.prompts(), None, new, settings, hooks)


def begin(
    model: Any, ids: Tensor, mask: Tensor | None, new: int, settings: dict[str, Any], hooks: Sequence[OnStep] = ()
) -> Engine:
    """A generation before its first step, as `dkv.generate` begins it; ids and mask [B, P], as it takes them.

    Raises:
        ValueError: inputs or settings are impossible.
    """
    # Dream's own schedule decodes nothing in its first step.
    config = dkv.DiffusionConfig(max_new_tokens=new, schedule="blocks", seed=0, **settings)
    config.cache.check(model.spec.shifted)
    ids, mask = checked_inputs(model, ids, mask, config)
    rows = Sequences.after_prompts(ids, mask, [new] * len(ids), model.spec.mask_token_id)
    return Engine(model, rows, config, Noise([0] * len(ids), rows), model.spec.mask_token_id, hooks=hooks)


def full_steps(engine: Engine) -> list[bool]:
    """By step, whether it computes every slot."""
    return engine.rows.timetable.steps(0).full.flatten().bool().tolist()


def skip(engine: Engine, steps: int) -> None:
    """Bring the rows to where they are after so many steps, without computing tokens: masks that count as filled."""
    for _ in range(steps):
        plan, status = engine.next_plan, engine.status
        # Nothing goes through the network, so nothing stops in it either.
        shape = Shape(*engine.filled(status.active), *engine.filled(status.scored))
        forward = Forward(Packed.of(engine.rows, plan, shape, engine.shifted), plan, None, False)
        slots = forward.packed.slots
        choice = Choice(torch.full_like(slots, engine.mask_id), torch.zeros(len(slots), device=slots.device))
        engine.commit(plan, forward, choice)
        engine.prepare()


class Through(NamedTuple):
    """What goes through a layer: entries that enter, ask, and leave it, and queries of a row without what fills up."""

    entering: int
    asking: int
    leaving: int
    queries: int


class HalfWay:
    """A generation with half of its slots filled, whose next step can be taken again and again.

    Args:
        options: the model and the canvas.
        settings: of `dkv.generate`; their policy says what is computed.
        cached: go on to a step that is not full, if there is one.
    """

    def __init__(self, options: Options, settings: dict[str, Any], cached: bool = False):
        self._last: StepResult | None = None
        self.engine = start(options, settings, options.new, [self._keep])
        full, rows = full_steps(self.engine), self.engine.rows
        self.engine.step()
        half = max(len(full) // 2, 1)
        # The first step of a block is one of a kind.
        skip(self.engine, (full.index(False, half + 1) if cached and False in full[half + 1 :] else half) - 1)
        table = rows.timetable
        state = [rows.tokens, rows.masked, rows.fresh, table.at, table.current, self.engine.seen]
        if self.engine.blocks is not None:
            state += [self.engine.blocks.stored, self.engine.blocks.stores]
        self._state = [(x, x.clone()) for x in state]

    def _keep(self, engine: Engine, result: StepResult) -> None:
        self._last = result

    def take(self) -> StepResult:
        """Take the step."""
        self.engine.step()
        return self._last

    def back(self) -> None:
        """Go back to before the step."""
        for x, was in self._state:
            x.copy_(was)
        self.engine.prepare()

    def seconds(self) -> float:
        """Of the step, which is taken and taken back."""
        seconds, _ = timed(self.take, self.engine.model.device)
        self.back()
        return seconds

    def sizes(self) -> dict[str, int]:
        """Of the step: slots of a row that are seen, how many are computed ("active") and have an output ("rows")."""
        batch, status = len(self.engine.rows.tokens), self.engine.status
        counts = status.visible or self.engine.rows.row_lengths, status.active, status.scored
        return dict(zip(("slots", "active", "rows"), (sum(of) // batch for of in counts), strict=True))

    def attention(self) -> list[tuple[Any, ...]]:
        """The arguments of the attention of every layer of the step, which is taken and taken back."""
        calls, call_operation = [], Operation.__call__

        def noted(operation: Operation, *args: Any, **hints: Any) -> Any:
            if operation is ATTENTION:
                calls.append(args)
            return call_operation(operation, *args, **hints)

        with patch.object(Operation, "__call__", noted):
            self.take()
        self.back()
        return calls

    def inputs(self, modules: Sequence[nn.Module]) -> list[Tensor]:
        """What goes into these modules in the step, which is taken and taken back."""
        found: list[Tensor] = []
        hooks = [module.register_forward_pre_hook(lambda _, given: found.append(given[0])) for module in modules]
        self.take()
        self.back()
        for hook in hooks:
            hook.remove()
        return found

    def entries(self) -> tuple[list[Through], int]:
        """Of the step, which is taken and taken back: what goes through each layer, and entries into the head."""
        found: list[tuple[int, int]] = []
        hooks = [
            layer.register_forward_hook(lambda _, taken, given: found.append((len(taken[0]), len(given[0]))))
            for layer in self.engine.model.layers
        ]
        try:
            calls = self.attention()
        finally:
            for hook in hooks:
                hook.remove()
        batch, layers = len(self.engine.rows.tokens), []
        for (entering, leaving), (query, _, _, rules, *_) in zip(found, calls, strict=True):
            layers.append(Through(entering, len(query), leaving, int(rules.query_lengths.sum()) // batch))
        return layers, len(self._last.forward.hidden)
