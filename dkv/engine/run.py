"""A generation from its canvas to its output: what callers of an engine share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from dkv.core.kv_cache import KVCache
from dkv.core.sequences import Sequences
from dkv.engine import in_blocks
from dkv.engine.config import DiffusionConfig
from dkv.engine.ending import Ending, id_list
from dkv.engine.engine import Engine, OnStep
from dkv.engine.inputs import checked_inputs
from dkv.engine.noise import Noise
from dkv.engine.output import DiffusionOutput, Stats
from dkv.engine.records import Recorder
from dkv.engine.speculation import Speculation
from dkv.parallel import Ranks, facts_of, ranks_of
from dkv.version import versions


class Steps(ABC):
    """A generation that is taken step by step, and watched or streamed alike, however it goes."""

    @property
    @abstractmethod
    def sequences(self) -> Tensor:
        """int64 [B, L]: the text so far, in the caller's layout."""

    @abstractmethod
    def steps(self) -> Iterator[bool]:
        """Take all steps, and pause after each; gives whether another one may follow."""

    @abstractmethod
    def state(self) -> DiffusionOutput:
        """The text so far, and what it cost."""

    @abstractmethod
    def output(self) -> DiffusionOutput:
        """The result, after the last step."""

    def drafts(self) -> Iterator[DiffusionOutput]:
        """Take all steps, one for every draft asked for; the last one is the output."""
        for more in self.steps():
            if more:
                yield self.state()
        yield self.output()

    def to_the_end(self, streamer: Any, prompts: Tensor, new: int) -> DiffusionOutput:
        """Take all steps; the streamer gets what was given, then the columns from `new` on, every step and at last."""
        if streamer is not None:
            streamer.put(prompts.cpu())
        draft, end = (getattr(streamer, name, None) for name in ("put_draft", "end"))
        for _ in self.steps():
            if draft is not None:
                draft(self.sequences[:, new:].cpu())
        output = self.output()
        if streamer is not None:
            streamer.put(output.sequences[:, new:].cpu())
            if end is not None:
                end()
        return output


class Run(Steps):
    """An engine with what is asked for around it: seeds, records, drafts, the output.

    Args:
        model, rows, config, mask_id: as for `Engine`.
        generator: source of the seeds if the settings have none.
        processor, criteria: of transformers, one or a list.
        past: as for `Engine`.
        ends: whether a row ends at an end id.
        ending: where rows end early, in place of what the settings and the criteria say.
        noise: makes the noise of the rows, in place of one from the seeds.
        on_step: as for `Engine`.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequences,
        config: DiffusionConfig,
        mask_id: int,
        generator: torch.Generator | None = None,
        processor: Any = None,
        criteria: Any = None,
        past: KVCache | None = None,
        ends: bool = True,
        ending: Ending | None = None,
        noise: Callable[[Sequences], Noise] | None = None,
        on_step: OnStep | None = None,
    ):
        batch = len(rows.tokens)
        self.model, self.config, self.recorder = model, config, Recorder(config)
        ranks = ranks_of(model)
        self.seed = drawn_seeds(config.seed, batch, generator, ranks)
        seeds = self.seed if isinstance(self.seed, list) else [self.seed] * batch
        if ranks is not None:
            ranks.check_same(**facts_of(model), **config.settings())
            ranks.check_same(input_ids=(rows.tokens, rows.masked, rows.lengths))
        processor = listed_processors(processor)
        criteria = _listed("stopping_criteria", criteria, StoppingCriteriaList)
        eos = ends_of(model, config) if ends else []
        hooks = [hook for hook in (self.recorder, on_step) if hook]
        if config.schedule == "speculative":
            given = {"logits_processor": processor, "stopping_criteria": criteria, "kv_cache": past}
            if name := next((name for name, value in given.items() if value is not None), None):
                raise ValueError(f'{name} does not go with schedule="speculative": leave one of them out')
            budgets = [config.of_row("max_new_tokens", row) for row in range(batch)]
            self.engine = Speculation(model, rows, config, mask_id, pad_id(model, config), budgets, eos, hooks)
            return
        if ending is None and (eos or criteria):
            ending = Ending(eos, criteria, batch, rows.tokens.device)
        given = noise(rows) if noise else Noise(seeds, rows)
        self.engine = Engine(
            model, rows, config, given, mask_id, pad_id(model, config), processor, ending, past, hooks=hooks
        )

    @classmethod
    def after_prompts(
        cls, model: Any, input_ids: Tensor, attention_mask: Tensor | None, config: DiffusionConfig, **how: Any
    ) -> "tuple[Tensor, Run]":
        """The checked prompts [B, P], and the run that continues them; `how` are further arguments of `Run`."""
        ids, mask = checked_inputs(model, input_ids, attention_mask, config)
        budgets = [config.of_row("max_new_tokens", row) for row in range(len(ids))]
        mask_id = mask_id_of(model, config)
        extra = in_blocks.extras(model.spec, config, mask, budgets)
        rows = Sequences.after_prompts(ids, mask, budgets, mask_id, pad=pad_id(model, config), extra=extra)
        return ids, cls(model, rows, config, mask_id, **how)

    @property
    def sequences(self) -> Tensor:
        return self.engine.sequences

    def steps(self) -> Iterator[bool]:
        while self.engine.numbers:
            self.engine.step()
            yield bool(self.engine.numbers)

    def state(self) -> DiffusionOutput:
        return DiffusionOutput(sequences=self.sequences, stats=self._stats())

    def output(self) -> DiffusionOutput:
        engine = self.engine
        return DiffusionOutput(
            sequences=engine.sequences, stats=self._stats(), kv_cache=engine.finish(), **self.recorder.fields()
        )

    def _stats(self) -> Stats:
        return self.engine.snapshot(seed=self.seed, settings=circumstances(self.engine, self.config))


def circumstances(engine: Any, config: DiffusionConfig) -> dict[str, Any]:
    """Settings, versions, dtype and device: what the result of an engine depends on, beside its rows."""
    model = engine.model
    facts = {"dtype": str(model.dtype), "device": str(model.device), "vocab_limit": engine.sampler.how["vocab_limit"]}
    return {**config.settings(), **versions(), **facts}


def mask_id_of(model: Any, config: DiffusionConfig) -> int:
    """The id of a slot without a token."""
    return model.spec.mask_token_id if config.mask_token_id is None else config.mask_token_id


def ends_of(model: Any, config: DiffusionConfig) -> list[int]:
    """The ids at which rows end; those of a block-causal model unless the settings name others, as published."""
    given = config.eos_token_id
    if given is None and model.spec.attention != "full":
        given = model.spec.eos_token_id
    return id_list(given)


def pad_id(model: Any, config: DiffusionConfig) -> int:
    """What a row is filled up with beyond its end."""
    eos = id_list(config.eos_token_id)[:1]
    known = (config.pad_token_id, model.spec.pad_token_id, *eos, model.spec.eos_token_id, 0)
    return next(number for number in known if number is not None)


def drawn_seeds(
    given: int | list[int] | None, rows: int, generator: torch.Generator | None, ranks: Ranks | None = None
) -> int | list[int]:
    """The seed that is given, or new ones, one a row; a single row's is a number. Processes get the same ones."""
    if given is not None:
        return given
    device = generator.device if generator else "cpu"
    drawn = torch.randint(2**62, (rows,), generator=generator, device=device).tolist()
    drawn = drawn if ranks is None else ranks.told(drawn)
    return drawn[0] if rows == 1 else drawn


def listed_processors(given: Any) -> LogitsProcessorList | None:
    """One logits processor, a list of them, or none, as transformers' list."""
    return _listed("logits_processor", given, LogitsProcessorList)


def _listed(name: str, given: Any, kind: type) -> Any:
    """One processor or criterion, a list of them, or none, as transformers' list of that kind, or None."""
    if given is None:
        return None
    listed = given if isinstance(given, list | tuple) else [given]
    for one in listed:
        if not callable(one):
            raise TypeError(f"{name} must be callable, as in transformers, or a list of such, got {one!r}")
    return (given if isinstance(given, kind) else kind(listed)) or None
