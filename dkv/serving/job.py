"""What is asked of a model by the lines of a data set, and what is written of its answers."""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dkv.common.journal import Record
from dkv.common.process import in_one_line
from dkv.engine import in_blocks
from dkv.engine.config import DiffusionConfig
from dkv.engine.inputs import check_settings
from dkv.engine.run import ends_of
from dkv.models.gemma_spec import GemmaSpec
from dkv.models.loader import spec_of
from dkv.serving.devices import Answer
from dkv.serving.filling import Asked
from dkv.serving.lines import Id, Line
from dkv.tools.text import answer, end_ids, turn_end_ids


@dataclass(frozen=True)
class Job:
    """What is asked for, beside the lines.

    Attributes:
        model: a name, or a model.
        tokenizer: of the model; None: lines are token ids.
        config: settings of lines that do not say otherwise; its seed is that of the run. Without ends, rows end where
            the tokenizer and the model say.
        loading: arguments of `dkv.load`.
        chat: prompts are messages of a user.
        devices: one, or several, which have a process each; None: one as by default.
        max_slots: of the rows of a device, as for `dkv.LLM`.
        max_length: slots of a line and its answer; None: as many as the model has.
    """

    model: Any
    tokenizer: Any
    config: DiffusionConfig
    loading: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = False
    devices: Sequence[str] | None = None
    max_slots: int | None = None
    max_length: int | None = None


class Questions:
    """Lines as the model takes them, and its answers as records.

    Args:
        job: what is asked for.

    Attributes:
        config: settings of lines that do not say otherwise, complete.
        seed: of the run; to be set before the first line.

    Raises:
        ValueError: a setting is impossible, or does not go with the model.
        OSError: the model cannot be read.
    """

    seed = 0

    def __init__(self, job: Job):
        self.job, self.config = job, copy.copy(job.config)
        self.spec = job.model.spec if hasattr(job.model, "spec") else _spec(job)
        if isinstance(self.spec, GemmaSpec) or self.config.schedule == "speculative":
            what = "DiffusionGemma" if isinstance(self.spec, GemmaSpec) else 'schedule="speculative"'
            raise ValueError(f"{what} does not go with data sets yet: use dkv.generate")
        if job.tokenizer is not None and self.config.eos_token_id is None:
            self.config.update(eos_token_id=end_ids(job.tokenizer, self.spec))
        if job.tokenizer is not None and self.config.eot_token_id is None:
            self.config.update(eot_token_id=turn_end_ids(job.tokenizer))
        described = _Described(self.spec)
        check_settings(described, self.config)
        self._ends = set(ends_of(described, self.config))

    @property
    def setting(self) -> Record:
        """What answers depend on, as far as it is known before a model is loaded."""
        job, settings = self.job, self.config.settings()
        return {
            "model": f"{self.spec.family} in memory" if hasattr(job.model, "spec") else str(job.model),
            **{name: value for name, value in job.loading.items() if value is not None and name != "dtype"},
            "chat": job.chat,
            **{name: value for name, value in settings.items() if not name.startswith("output_")},
            "max_length": job.max_length,
            "seed": self.seed,
        }

    def asked(self, line: Line) -> Asked | Answer:
        """What is asked by a line, or why it cannot be."""
        if line.error is not None:
            return Answer(line.number, error=line.error)
        try:
            ids = line.encoded(self.job.tokenizer, self.job.chat)
        except ValueError as error:
            return Answer(line.number, error=in_one_line(error))
        asked = Asked(line.number, ids, {**line.own, "seed": self._seed_of(line)})
        limit, needed = self.job.max_length or self.spec.max_positions, self.needed(asked)
        if needed > limit:
            has = "there may be" if self.job.max_length else "the model has"
            return Answer(line.number, error=f"{len(ids)} tokens and the answer need {needed} slots, and {has} {limit}")
        return asked

    def needed(self, asked: Asked) -> int:
        """Slots of a prompt and its answer."""
        prompt, new = len(asked.ids), asked.settings.get("max_new_tokens", self.config.of_row("max_new_tokens", 0))
        return prompt + new + in_blocks.extra(self.spec, self.config, prompt, new)

    def record(self, line: Line, found: Answer) -> Record:
        """What is written of a line."""
        known: Record = {"id": line.id, "line": line.number}
        if found.error is not None:
            return {**known, "error": found.error}
        tokenizer, ended = self.job.tokenizer, not self._ends.isdisjoint(found.tokens)
        return {
            **known,
            "text": None if tokenizer is None else answer(tokenizer, self.spec, found.tokens),
            "tokens": found.tokens,
            "finish_reason": "stop" if ended else "length",
            "seed": self._seed_of(line),
            "stats": found.stats,
        }

    def _seed_of(self, line: Line) -> int:
        return line.own.get("seed", derived_seed(self.seed, line.id))


class _Described:
    """A model of which no more is known than its small files tell."""

    step = None

    def __init__(self, spec: Any):
        self.spec = spec


def _spec(job: Job) -> Any:
    of_weights = ("dtype", "weights", "keep_head")
    return spec_of(job.model, **{name: value for name, value in job.loading.items() if name not in of_weights})


def derived_seed(seed: int, line_id: Id) -> int:
    """The seed of a line, from that of a run: the same whenever, wherever and beside whatever it is answered."""
    text = json.dumps([seed, line_id])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 2
