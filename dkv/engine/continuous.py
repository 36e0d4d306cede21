"""Rows that sequences join and leave between two steps."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dkv.core.kv_cache import KVCache
from dkv.core.sequences import Sequences, column
from dkv.engine import in_blocks
from dkv.engine.config import DiffusionConfig
from dkv.engine.ending import Ending
from dkv.engine.engine import Engine, OnStep
from dkv.engine.graphs import state_of
from dkv.engine.noise import Noise
from dkv.engine.run import ends_of, mask_id_of, pad_id
from dkv.engine.settings import BY_ROW
from dkv.engine.stages import Status, StepPlan


class ContinuousBatch(Engine):
    """A generation whose rows are taken by one sequence after the other; each gets the tokens that it gets alone.

    Those that join are planned as a batch of their own; what the engine of that batch keeps between two steps is then
    written over what their rows had. A row that nobody has is a finished one: nothing of it is computed.

    Args:
        model: from `dkv.load` or `dkv.wrap`.
        rows, slots: how many sequences there is room for, and how many slots each may have.
        config: settings of all of them, but for those of `dkv.engine.settings.BY_ROW`, each sequence's own.
        processor: as for `Engine`.
        cache: where keys and values are kept, of at least so many rows and slots; those of rows that nobody has here
            may be another batch's.
        infill: the sequences are texts whose masks are filled, in place of prompts that are continued.
        hooks: as for `Engine`.

    What the host knows of a step, `status`, is read once, and says beside the rest which slot of a row is the first
    without a token; `status.first`.

    Attributes:
        invalid_rows: in which any logits were no numbers in the last step; they are to be left.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        slots: int,
        config: DiffusionConfig,
        processor: Any = None,
        cache: KVCache | None = None,
        infill: bool = False,
        hooks: Sequence[OnStep] = (),
    ):
        self.invalid_rows: list[int] = []
        self._infill = infill
        self._processor, self._room = processor, (slots, 0)
        # Those of each sequence are its own.
        config = copy.copy(config)
        config.update(steps=None)
        super().__init__(**self._parts(model, config, self._unfilled(model, config, rows)), cache=cache, hooks=hooks)
        self._room = slots, self.rows.timetable.most
        nobody = self._unfilled(model, config, 1)
        self._nobody = Engine(**self._parts(model, config, nobody), graphs=False)
        nobody.masked.zero_()
        self._nobody.prepare()
        self._of_rows = [_rows_of(mine, one) for mine, one in _pairs(self, self._nobody)]
        self.leave(0)

    def _unfilled(self, model: Any, config: DiffusionConfig, rows: int) -> Sequences:
        """Rows that have all slots. The first one has them all to fill: none needs a longer plan."""
        real = torch.ones(rows, self._room[0], dtype=torch.bool, device=model.device)
        fill, mask_id = torch.zeros_like(real), mask_id_of(model, config)
        fill[0] = True
        return Sequences(torch.full_like(real, mask_id, dtype=torch.int64), real, fill, mask_id, self._room)

    def _parts(
        self, model: Any, config: DiffusionConfig, rows: Sequences, seeds: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """The arguments of an engine for such rows."""
        eos, batch = [] if self._infill else ends_of(model, config), len(rows.tokens)
        return {
            "model": model,
            "rows": rows,
            "config": config,
            "noise": Noise(seeds or [0] * batch, rows),
            "mask_id": mask_id_of(model, config),
            "pad_id": pad_id(model, config),
            "processor": self._processor,
            "ending": Ending(eos, None, batch, rows.tokens.device) if eos else None,
        }

    def join(self, rows: Sequence[int], prompts: Sequence[Tensor], configs: Sequence[DiffusionConfig]) -> None:
        """Let sequences have rows that nobody has; all of them, or where an error is raised none.

        Args:
            rows: which, one for each.
            prompts: int64 [P] each, where the model is; or texts with masks.
            configs: the settings of each, which go with its prompt (`checked_inputs`): those of the batch but for
                `BY_ROW`; with a seed.

        Raises:
            ValueError: one asks for more than a row has.
        """
        alone = self._planned(prompts, configs)
        try:
            self._write(rows, alone)
            self.note_rows()
        except BaseException:
            # As where there is no memory to grow into.
            self._clear(rows)
            raise

    def _planned(self, prompts: Sequence[Tensor], configs: Sequence[DiffusionConfig]) -> Engine:
        """Those that join as a batch of their own, before its first step."""
        model, (slots, steps), given = self.model, self._room, self._given(prompts, configs)
        config, seeds = _in_one(configs), [config.of_row("seed", 0) for config in configs]
        alone = Engine(**self._parts(model, config, given, seeds), graphs=False)
        if (most := given.timetable.most) > steps:
            raise ValueError(f"steps must be at most {steps} in rows of {slots} slots, got {most}")
        if not alone.numbers:  # They have nothing to fill.
            alone.prepare()
        return alone

    def _given(self, prompts: Sequence[Tensor], configs: Sequence[DiffusionConfig]) -> Sequences:
        """The rows of those that join."""
        slots, lengths = self._room[0], [len(prompt) for prompt in prompts]
        ids = pad_sequence([*prompts], batch_first=True, padding_value=self.pad_id)
        mask = torch.arange(ids.shape[1], device=ids.device) < column(lengths, ids.device)
        budgets = [0 if self._infill else config.of_row("max_new_tokens", 0) for config in configs]
        extra = [0] * len(budgets) if self._infill else in_blocks.extras(self.model.spec, configs[0], mask, budgets)
        for length, needed in zip(lengths, map(sum, zip(lengths, budgets, extra, strict=True)), strict=True):
            if needed > slots:
                raise ValueError(f"a prompt of {length} tokens and its answer need {needed} slots, a row has {slots}")
        if self._infill:
            return Sequences(ids, mask, mask & (ids == self.mask_id), self.mask_id, self._room)
        return Sequences.after_prompts(ids, mask, budgets, self.mask_id, self.pad_id, extra, self._room)

    def leave(self, row: int) -> None:
        """Let a row be nobody's, whether its sequence is finished or not. One that is finished need not be left."""
        self._clear([row])

    def _clear(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._write([row], self._nobody)
        self.note_rows()

    def _write(self, rows: Sequence[int], alone: Engine) -> None:
        """Write what an engine keeps between two steps over what `rows`, one for each of its own, have."""
        # By how many the branches are: those of a row lie so many rows of the batch apart.
        batch, index = len(self.rows.tokens), {}
        for (mine, theirs), place in zip(_pairs(self, alone), self._of_rows, strict=True):
            if place is None:
                mine.copy_(theirs)
                continue
            dim, branches = place
            if branches not in index:
                every = [row + branch * batch for branch in range(branches) for row in rows]
                index[branches] = torch.tensor(every, device=mine.device)
            mine.index_copy_(dim, index[branches], theirs)
        if self.planner.most is not None and alone.planner.most > self.planner.most:
            # A part of what was captured.
            self.planner.most, self.runner = alone.planner.most, self.runner and type(self.runner)(self)
        for number, row in enumerate(rows):
            for name in ("row_lengths", "to_fill"):
                getattr(self.rows, name)[row] = getattr(alone.rows, name)[number]
            for field in fields(Status):
                mine, theirs = getattr(self.status, field.name), getattr(alone.status, field.name)
                for own, other in zip(mine, theirs, strict=True) if field.name == "left" else [(mine, theirs)]:
                    # Nobody asks for the first slot without a token before a step.
                    if other is not None:
                        own[row] = other[number]

    def read_status(self) -> None:
        """Read what the host has to know of the next step, once."""
        self.status = status = Status.after(self.next_plan, _first_masks(self.rows))
        self.note_rows()
        self.invalid_rows = [row for row, invalid in enumerate(status.invalid) if invalid]


def _first_masks(rows: Sequences) -> Tensor:
    """int64 [B]: the first slot without a token, of a row that has one."""
    # A byte of each is its largest.
    return rows.masked.view(torch.uint8).argmax(1)


def _in_one(configs: Sequence[DiffusionConfig]) -> DiffusionConfig:
    """Settings of rows, which differ by row alone, as those of a batch."""
    if len(configs) == 1:
        return configs[0]
    config = copy.copy(configs[0])
    # As they are: each has been checked, and a list of a caller holds no None.
    vars(config).update({name: [one.of_row(name, 0) for one in configs] for name in BY_ROW})
    return config


def slots_needed(model: Any, input_ids: Tensor, config: DiffusionConfig) -> int:
    """Slots of a prompt [1, P] and its answer, and of what is filled with it."""
    budget = config.of_row("max_new_tokens", 0)
    extra = in_blocks.extras(model.spec, config, torch.ones_like(input_ids, dtype=torch.bool), [budget])
    return input_ids.shape[1] + budget + sum(extra)


def _pairs(batch: Engine, alone: Engine) -> Iterator[tuple[Tensor, Tensor]]:
    """What two engines of the same settings keep between two steps, tensor by tensor; keys and values apart."""
    for (_, name, mine), (_, same, theirs) in zip(state_of(batch), state_of(alone), strict=True):
        if name != same:
            raise AssertionError(f"{name} and {same} are not of the same settings")
        yield mine, theirs
    for field in fields(StepPlan):
        mine, theirs = getattr(batch.next_plan, field.name), getattr(alone.next_plan, field.name)
        if mine is not None:
            yield mine, theirs


def _rows_of(batch: Tensor, one: Tensor) -> tuple[int, int] | None:
    """In which dimension the rows of a tensor are, and in how many branches; None: it is the same for any row.

    The shape of the same tensor for `one` row tells. A batch of one row takes whatever there is.
    """
    differ = [(dim, alone) for dim, alone in enumerate(one.shape) if batch.shape[dim] != alone]
    return differ[0] if differ else None
