"""Settings of a generation, in transformers' form and under the names of both model families."""

import functools
import warnings
from dataclasses import asdict
from typing import Any

from transformers import GenerationConfig

from dkv.core.schedule import Step, block_schedule, check_steps, time_schedule
from dkv.core.sliding import Region
from dkv.core.validation import MOST
from dkv.engine import rules
from dkv.engine.published_caches import CACHE_NAMES, choose_policy
from dkv.engine.published_names import BOOKKEEPING, canonical, check_other, choose_temperature, own_name
from dkv.engine.settings import BY_ROW, DEFAULTS, ORDERS, check_value
from dkv.policies import policy_of

SCHEDULES = ("blocks", "time", "sliding", "speculative")


class DiffusionConfig(GenerationConfig):
    """How to fill a canvas: schedule, choice of tokens, cache policy, and what to record.

    Settings of transformers and of the published generate functions act or are refused (`dkv.engine.published_names`);
    None stands for the default.

    Args:
        max_new_tokens: slots to fill (LLaDA: `gen_length`); 0 gives the prompt back. A list: by row.
        max_length: as in transformers, columns of the prompt, padding included, and slots to fill together. Given
            beside `max_new_tokens`, it is not used, with a warning.
        steps: passes in all; None: one per slot. With a rule of confidence, that is `threshold`, `factor` or
            `entropy_bound`, the most that are made. A list: by row.
        block_length: slots of a block of LLaDA's schedule; None: one block.
        schedule: "blocks" (LLaDA), "time" (Dream) or "sliding" (DSB: slots are filled from the first mask up to
            `block_length` beyond as many as are filled); None: that of the model. "speculative" lets a model that
            can be read causally verify what it writes as a block (Nemotron, `linear_spec`).
        quotas: how many slots of a block each of its steps fills: "equal" shares, the first ones larger by one (LLaDA),
            or "rounded" shares of what is left (A2D, dllm).
        most: slots of the region that slides, from its first mask, at most; None: it may reach the end of the row.
        eps: last time of Dream's schedule.
        confidence: which slots are decoded first: "probability" of the best token, "margin" to the
            second, negative "entropy", "random", or "sequential", from the left; or a published name of these
            (`remasking`, `alg`).
        confidence_dtype: "exact" tells apart probabilities however close to 1 they are. "model" computes them as
            Dream's published code does, in the dtype of the model: at a temperature of 0.1 in bfloat16 most become
            equal, and of equals the leftmost slot is filled. Scores reported for Dream at low temperatures (GSM8K
            about 80, against 35 to 58 at temperature 0) were made that way. LLaDA's published code takes a float64
            softmax, which "exact" orders alike; there "model" rounds what it does not.
        temperature: 0 takes the best token; above 0 tokens are drawn. `do_sample` of transformers must agree with
            it; True alone is a temperature of 1.
        top_p, top_k: tokens outside are neither drawn nor counted.
        selection_temperature: above 0 the slots are drawn by confidence (Dream: `alg_temp`).
        threshold: fill every slot of the block whose confidence is at least this, and always the surest one
            (Fast-dLLM): a probability or a margin, with "entropy" the negative entropy in nats.
        threshold_decay: let the threshold fall while a block fills (Streaming-dLLM): from its second step on it is
            threshold (1 - threshold_decay (1 - r)), r the share of masks among the slots to fill that are seen from
            the first of the block on. Of an entropy this is true of its exponential. 0: it stays; at most 1.
        certainty: multiply confidences by how much is known around a slot, and rank slots by that: known slots within
            about so many count (the standard deviation of a Gaussian, d2Cache; 10 there). `threshold` and `factor` then
            go by the product, as published. With "entropy" its exponential is what is multiplied.
        near_threshold, radius: beside a `threshold`, such as 0.75 beside 0.9: fill every slot, too, whose confidence is
            at least this and that is at most `radius` slots away from one that reaches `threshold` (LocalLeap).
        factor: fill the n surest slots of the block, n as large as (n + 1) (1 - c) < factor allows, where c is
            the confidence of the n-th (Fast-dLLM).
        entropy_bound: fill the n surest slots of the block, n as large as this allows for the sum of the entropies of
            their tokens, in nats, without the largest of them (Ben-Hamu et al. 2025). 0 fills one a step.
        entropy_form: "paper": that sum. "code": the sum without the entropy of the n-th, which is the larger sum and so
            the stricter rule, as in the published code of d2Cache.
        edit_threshold: let a filled slot of the current block take the best token of a pass where that is another one,
            and more probable than this (LLaDA2.1, whose blocks know finished tokens only); None: filled slots stay.
        post_steps: passes over a block that has no mask left at most, made as long as they edit.
        cfg_scale: guidance: logits are l + cfg_scale (l - l'), l' with everything masked that was given (LLaDA).
            Both branches are computed, each with its own keys and values; 0: none.
        eos_token_id: id or ids. A row ends at its first one as soon as no mask stands before it, takes
            `pad_token_id` from there on and leaves the batch. None: every slot is filled, but in block-causal models,
            whose rows end at the end token of the model; both as published. []: every slot is filled.
        pad_token_id: None: that of the model, or the first end id.
        eot_token_id: id or ids that end a turn of a talk, for `confidence_eos_eot_inf`; None: that of the model.
        logits_eos_inf: never emit `eos_token_id`, or that of the model: its logit is -inf (LLaDA).
        confidence_eos_eot_inf: fill slots whose token is `eos_token_id` or `eot_token_id`, or those of the model, last,
            with that token; how sure the others are is told without these ids (LLaDA). Computes the head twice.
        cache: a policy, its name (such as "decode" or "dual"; `dkv.policies.POLICIES` has all), or a dict
            {"name": ..., "refresh": ...}; None: no cache. Or by the names in `dkv.engine.published_caches`.
        kv_cache_dtype: "int8" keeps keys and values in 8 bits, with a scale for each slot and head, in about half the
            memory of half precision; "auto" in the dtype of the model.
        seed: of every random number; None: one a row, drawn from the generator. A list: by row.
        mask_token_id: id of a slot without a token; None: that of the model. It is never emitted.
        vocab_limit: ids from here on are never emitted (embeddings wider than the tokenizer).
        output_history, output_active, output_confidences, output_logits: record the canvas after
            every step, the slots that each pass computed, how sure it was of those it ranked, and the
            logits of those it computed.

    Raises:
        ValueError: an unknown name (with the nearest known one), or an impossible value.

    Example:
        >>> DiffusionConfig(max_new_tokens=256, block_length=32, cache=dkv.DecodeCache(refresh=8))
    """

    def __init__(self, **settings: Any):
        super().__init__(**{name: settings.pop(name) for name in BOOKKEEPING if name in settings})
        # These act on other settings, and are not kept: transformers has defaults for them.
        vars(self).update(DEFAULTS, do_sample=None, use_cache=None)
        self._take(settings)
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        """A setting takes what `update` takes, by any name; whether it goes with the others is seen when it is used."""
        if own_name(name) in DEFAULTS and hasattr(self, "vocab_limit"):
            self._take({name: value})
        else:
            super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, whose `use_cache` in a file is about its own decoding and does not choose a policy."""
        if not isinstance(config_dict, dict):
            raise ValueError(f"a configuration must be a dict of settings, got {config_dict!r}")
        says_which = {"cache", *CACHE_NAMES} - {"use_cache"}
        if config_dict.get("use_cache") is True and not says_which & {*config_dict, *kwargs}:
            warnings.warn("use_cache=True of the file does not say which cache: none is used", stacklevel=2)
            config_dict = {name: value for name, value in config_dict.items() if name != "use_cache"}
        return super().from_dict(config_dict, **kwargs)

    def update(self, **settings: Any) -> dict[str, Any]:
        """Set the given names, published ones included; unknown names are refused, so nothing is left over."""
        before = dict(vars(self))
        try:
            self._take(settings)
            self.validate()
        except Exception:
            vars(self).clear()
            vars(self).update(before)
            raise
        return {}

    def _take(self, settings: dict[str, Any]) -> None:
        """Set what is given, under any name, and make objects of what is given by name or as a dict."""
        given = canonical(settings, (*DEFAULTS, *BOOKKEEPING))
        choose_policy(given, policy_of(self.cache).name)
        choose_temperature(given, self.temperature)
        if given.get("max_new_tokens") is not None:
            if given.get("max_length") is not None:
                warnings.warn("max_new_tokens and max_length are both given: max_new_tokens is used", stacklevel=4)
            given["max_length"] = None
        unset = {"eot_token_id": []}
        # None puts the default back.
        taken = {n: DEFAULTS.get(n) if value in (None, unset.get(n)) else value for n, value in given.items()}
        taken["cache"] = policy_of(taken.get("cache", self.cache))
        by_threshold = "confidence_threshold" in map(str, (settings.get("alg"), settings.get("remasking")))
        if by_threshold and taken.get("threshold", self.threshold) is None:
            raise ValueError("alg='confidence_threshold' goes by threshold=, which is 0.9 in the published code")
        vars(self).update(taken)

    def validate(self, **_: Any) -> None:
        """Raise ValueError where a value is impossible, naming the setting and what it may be."""
        if not hasattr(self, "vocab_limit"):  # transformers validates before our settings are there
            return
        for name, value in vars(self).items():
            known = name in DEFAULTS or name in BOOKKEEPING or value is None or value is _of_transformers().get(name)
            if not known and not check_other(name, value):
                raise ValueError(f"unknown setting {name!r}, set as an attribute; known are {', '.join(DEFAULTS)}")
        for name in DEFAULTS:
            check_value(name, getattr(self, name))
        rules.check(self)
        lacking = f"a confidence to go by, and confidence={self.confidence!r} has none"
        if self.confidence_eos_eot_inf and self.is_ordered:
            raise ValueError(f"confidence_eos_eot_inf needs {lacking}")
        if self.selection_temperature > 0 and self.is_ordered:
            raise ValueError(f"selection_temperature needs {lacking}")
        if self.is_ordered:
            by_cache = f"cache={self.cache.name!r}" if self.cache.by_confidence else None
            goes_by = "certainty" if self.certainty else by_cache
            if goes_by:
                raise ValueError(f"{goes_by} needs {lacking}")
        self._validate_schedule()
        lists = {name: len(value) for name in BY_ROW if isinstance(value := getattr(self, name), list)}
        if len(set(lists.values())) > 1:
            given = ", ".join(f"{count} of {name}" for name, count in lists.items())
            raise ValueError(f"settings by row must be one for every row of the batch, got {given}")
        # How many slots there are to fill is known when the prompt is.
        for row in range(max(lists.values(), default=1) if self.max_length is None else 0):
            self.check_steps(shifted=False, row=row)

    def _validate_schedule(self) -> None:
        slides = self.schedule == "sliding"
        if self.schedule not in (None, *SCHEDULES):
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.schedule == "time" and self.block_length is not None:
            raise ValueError('block_length goes with schedule="blocks" or "sliding"; the time schedule has one block')
        if slides and self.block_length is None:
            raise ValueError('schedule="sliding" needs block_length, the slots that are open at first, such as 32')
        if self.most is not None and not slides:
            raise ValueError(f'most={self.most} goes with schedule="sliding": blocks have their block_length')
        if self.cache.slides and not slides:
            raise ValueError(f'cache {self.cache.name!r} follows the region that slides: give schedule="sliding"')
        if self.cache.slides is False and slides:
            raise ValueError(f'cache {self.cache} goes by blocks, which do not slide: give schedule="blocks"')

    @property
    def is_dynamic(self) -> bool:
        """Whether confidences decide how many slots a step fills."""
        return bool(rules.given(self))

    @property
    def is_ordered(self) -> bool:
        """Whether the order of the slots is known before the pass."""
        return self.confidence in ORDERS

    def of_row(self, name: str, row: int) -> Any:
        """A setting of `BY_ROW` for one row."""
        value = getattr(self, name)
        return value[row] if isinstance(value, list) else value

    def check_steps(self, shifted: bool, row: int = 0) -> None:
        """Raise ValueError if the plan of a row cannot be made; costs nothing, however long the plan would be."""
        new = self.of_row("max_new_tokens", row)
        check_steps(new, self.of_row("steps", row) or new, self._block_length(shifted, new))

    def plan(self, shifted: bool, row: int = 0, to_fill: int | None = None) -> list[Step]:
        """The steps, with the number of slots that each decodes; can be printed.

        Args:
            shifted: whether the model is of Dream's kind, whose own schedule is the one in time.
            row: of the batch, where settings are given row by row.
            to_fill: its slots to fill; default: its `max_new_tokens`.

        Raises:
            ValueError: fewer steps than blocks, or far more of the time schedule than slots.
        """
        new = self.of_row("max_new_tokens", row) if to_fill is None else to_fill
        steps, block_length = self.of_row("steps", row) or new, self._block_length(shifted, new)
        if new == 0:
            return []
        if block_length is None:
            return time_schedule(new, steps, self.eps, by_chance=self.confidence == "random")
        if self.region:
            # Which slots are open follows the row: the plan says how many are filled.
            check_steps(new, steps, block_length)
            return block_schedule(new, steps, new)
        return block_schedule(new, steps, block_length, self.quotas == "rounded")

    @property
    def region(self) -> Region | None:
        """How the open region slides; None: in another schedule than the sliding one."""
        return Region(self.block_length, self.most) if self.schedule == "sliding" else None

    def _block_length(self, shifted: bool, new: int) -> int | None:
        """The most slots that are open at a time; None for the time schedule."""
        return None if self.in_time(shifted) else min(self.block_length or max(new, 1), self.most or MOST)

    def in_time(self, shifted: bool) -> bool:
        """Whether the schedule is that in time, for a model of Dream's kind (`shifted`) or of LLaDA's."""
        # Dream's own schedule has no blocks: asking for them asks for LLaDA's.
        default = "time" if shifted and self.block_length is None else "blocks"
        return (self.schedule or default) == "time"

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, for JSON."""
        plain = super().to_dict()
        plain["cache"] = {"name": self.cache.name, **asdict(self.cache)}
        if self.max_length is not None:
            # That is what counts; beside it, a number would count when this is read.
            plain["max_new_tokens"] = None
        return plain

    def settings(self) -> dict[str, Any]:
        """Our own settings alone, as plain values: what a result is recorded with."""
        plain = self.to_dict()
        return {name: plain[name] for name in DEFAULTS}

    def to_diff_dict(self) -> dict[str, Any]:
        """Our settings that differ from their defaults, and what transformers keeps for itself."""
        plain = self.to_dict()
        plain_defaults = {**DEFAULTS, "cache": {"name": "none"}}
        names = (*DEFAULTS, *BOOKKEEPING)
        return {n: plain[n] for n in names if plain.get(n) is not None and plain[n] != plain_defaults.get(n)}


@functools.cache
def _of_transformers() -> dict[str, Any]:
    """The attributes of a configuration of transformers, with their defaults."""
    return vars(GenerationConfig())
