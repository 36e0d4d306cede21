"""Rows that sequences join and leave between two steps."""

import copy
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from dkv.core.kv_cache import KVCache
from dkv.core.sequences import Sequences
from dkv.engine import in_blocks
from dkv.engine.config import DiffusionConfig
from dkv.engine.ending import Ending
from dkv.engine.engine import Engine
from dkv.engine.graphs import state_of
from dkv.engine.inputs import checked_inputs
from dkv.engine.noise import Noise
from dkv.engine.run import ends_of, mask_id_of, pad_id
from dkv.engine.stages import Status, StepPlan


class ContinuousBatch(Engine):
    """A generation whose rows are taken by one sequence after the other; each gets the tokens that it gets alone.

    A sequence that joins is planned as a batch of one; what the engine of that batch keeps between two steps is then
    written over what the row had. A row that nobody has is a finished one: nothing of it is computed.

    Args:
        model: from `dkv.load` or `dkv.wrap`.
        rows, slots: how many sequences there is room for, and how many slots each may have.
        config: settings of all of them, but for those of `dkv.engine.settings.BY_ROW`, each sequence's own.
        processor: as for `Engine`.
        cache: where keys and values are kept, of at least so many rows and slots; those of rows that nobody has here
            may be another batch's.

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
    ):
        self.invalid_rows: list[int] = []
        self._processor, self._room = processor, (slots, 0)
        # Those of each sequence are its own.
        config = copy.copy(config)
        config.update(steps=None)
        super().__init__(**self._parts(model, config, self._unfilled(model, config, rows)), cache=cache)
        self._room = slots, self.rows.timetable.most
        nobody = self._unfilled(model, config, 1)
        self._nobody = Engine(**self._parts(model, config, nobody), graphs=False)
        nobody.masked.zero_()
        self._nobody.prepare()
        for row in range(rows):
            self.leave(row)

    def _unfilled(self, model: Any, config: DiffusionConfig, rows: int) -> Sequences:
        """Rows that have all slots, all of them to fill: none needs a longer plan."""
        slots = self._room[0]
        every = torch.ones(rows, slots, dtype=torch.bool, device=model.device)
        mask_id = mask_id_of(model, config)
        return Sequences(torch.full_like(every, mask_id, dtype=torch.int64), every, every, mask_id, self._room)

    def _parts(self, model: Any, config: DiffusionConfig, rows: Sequences, seed: int = 0) -> dict[str, Any]:
        """The arguments of an engine for such rows."""
        eos, batch = ends_of(model, config), len(rows.tokens)
        return {
            "model": model,
            "rows": rows,
            "config": config,
            "noise": Noise([seed] * batch, rows),
            "mask_id": mask_id_of(model, config),
            "pad_id": pad_id(model, config),
            "processor": self._processor,
            "ending": Ending(eos, None, batch, rows.tokens.device) if eos else None,
        }

    def join(self, row: int, input_ids: Tensor, config: DiffusionConfig) -> None:
        """Let a sequence have a row that nobody has.

        Args:
            row: which.
            input_ids: [1, P], its prompt.
            config: its settings, those of the batch but for `BY_ROW`; with a seed.

        Raises:
            ValueError, IndexError: the input or a setting is impossible, or asks for more than a row has.
        """
        ids, mask = checked_inputs(self.model, input_ids, None, config)
        budget, room = config.of_row("max_new_tokens", 0), self._room
        extra = in_blocks.extras(self.model.spec, config, mask, [budget])
        if (needed := slots_needed(self.model, ids, config)) > room[0]:
            raise ValueError(
                f"a prompt of {ids.shape[1]} tokens and its answer need {needed} slots, a row has {room[0]}"
            )
        rows = Sequences.after_prompts(ids, mask, [budget], self.mask_id, self.pad_id, extra, room)
        alone = Engine(**self._parts(self.model, config, rows, config.of_row("seed", 0)), graphs=False)
        if rows.timetable.most > room[1]:
            raise ValueError(f"steps must be at most {room[1]} in rows of {room[0]} slots, got {config.steps}")
        if not alone.numbers:  # It has nothing to fill.
            alone.prepare()
        self._take(row, alone)

    def leave(self, row: int) -> None:
        """Let nobody have a row any more, whether its sequence is finished or not."""
        self._take(row, self._nobody)

    def _take(self, row: int, alone: Engine) -> None:
        """Write what an engine of one row keeps between two steps over what a row has."""
        for mine, theirs in _pairs(self, alone):
            _of_row(mine, theirs, row).copy_(theirs)
        if self.planner.most is not None and alone.planner.most > self.planner.most:
            # A part of what was captured.
            self.planner.most, self.runner = alone.planner.most, self.runner and type(self.runner)(self)
        self.rows.row_lengths[row], self.rows.to_fill[row] = alone.rows.row_lengths[0], alone.rows.to_fill[0]
        for field in fields(Status):
            mine, theirs = getattr(self.status, field.name), getattr(alone.status, field.name)
            for own, other in zip(mine, theirs, strict=True) if field.name == "left" else [(mine, theirs)]:
                if own is not None:
                    own[row] = other[0]
        self.note_rows()

    def read_status(self) -> None:
        """Read what the host has to know of the next step, once."""
        self.status = status = Status.after(self.next_plan)
        self.note_rows()
        self.invalid_rows = [row for row, invalid in enumerate(status.invalid) if invalid]


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


def _of_row(batch: Tensor, alone: Tensor, row: int) -> Tensor:
    """The part of a row, or of its branches: the dimension of the rows is the one in which the shapes differ."""
    for dim, (all_rows, one) in enumerate(zip(batch.shape, alone.shape, strict=True)):
        if all_rows != one:
            return batch[(slice(None),) * dim + (slice(row, None, all_rows // one),)]
    return batch
