"""Settings of a generation, in transformers' form and under the names of both model families."""

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor
from transformers import GenerationConfig

from dkv.naming import instead, nearest
from dkv.policies import POLICIES, POLICY_OPTIONS, NoCache, Policy
from dkv.schedule import Step, block_schedule, time_schedule
from dkv.validation import check_numbers

CONFIDENCE_RULES = ("probability", "margin", "entropy", "random")


@dataclass(frozen=True)
class Savings:
    """Work that dkv leaves out without changing a token; each can be put back to measure it.

    Args:
        needed_rows: logits, final norm and the last layer's queries and MLP only at the slots that
            may be decoded now, not at every slot of the pass.
        rotated_keys: keys are stored with their rotary embedding, not rotated again in every pass.
        tail_confidence: confidences in float32 from the tail, not from a float64 softmax of a copy.
        host_counts: the schedule gives the number of active slots; nothing is read back per step.
    """

    needed_rows: bool = True
    rotated_keys: bool = True
    tail_confidence: bool = True
    host_counts: bool = True


DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 128,
    "steps": None,
    "block_length": None,
    "schedule": None,
    "eps": 1e-3,
    "confidence": "probability",
    "temperature": 0.0,
    "top_p": None,
    "top_k": None,
    "selection_temperature": 0.0,
    "threshold": None,
    "factor": None,
    "cfg_scale": 0.0,
    "eos_token_id": None,
    "pad_token_id": None,
    "cache": None,
    "seed": None,
    "mask_token_id": None,
    "vocab_limit": None,
    "output_history": False,
    "output_active": False,
    "output_confidences": False,
    "output_logits": False,
    "savings": Savings(),
}

# Names in the generate functions of LLaDA and Dream -> (name here, values that are spelled otherwise).
ALIASES: dict[str, tuple[str, dict[str, str]]] = {
    "gen_length": ("max_new_tokens", {}),
    "mask_id": ("mask_token_id", {}),
    "remasking": ("confidence", {"low_confidence": "probability"}),
    "alg": ("confidence", {"origin": "random", "maskgit_plus": "probability", "topk_margin": "margin"}),
    "alg_temp": ("selection_temperature", {}),
}

# Settings of those functions that have one value here: it is accepted, any other is refused.
FIXED: dict[str, Any] = {"num_return_sequences": 1, "return_dict_in_generate": True}

# What transformers writes into generation_config.json files for its own use.
BOOKKEEPING = ("transformers_version", "bos_token_id", "use_cache", "do_sample")
# Settings that may be given row by row, as a list.
BY_ROW = ("max_new_tokens", "steps", "seed")
# Settings for which LLaDA's and Dream's functions take None, meaning none.
NONE_IS_DEFAULT = ("temperature", "selection_temperature", "cfg_scale")


def policy_of(value: Any) -> Policy:
    """A policy from itself, its name, a dict {"name": ..., **arguments}, or None for `NoCache`.

    Raises:
        ValueError: no such policy, or no such argument.
    """
    if value is None:
        return NoCache()
    if isinstance(value, Policy):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        raise ValueError(f"cache must be a policy, its name or a dict, got {value!r}")
    name, arguments = value.get("name"), {k: v for k, v in value.items() if k != "name"}
    if name not in POLICIES:
        raise ValueError(f"cache: unknown policy {name!r}; {instead(name, POLICIES)}")
    known = {f.name for f in fields(POLICIES[name])}
    if unknown := sorted(set(arguments) - known):
        takes = ", ".join(sorted(known)) or "no arguments"
        near = None if unknown[0] in POLICY_OPTIONS else nearest(unknown[0], known)
        hint = f" (did you mean {near!r}?)" if near else ""
        raise ValueError(f"cache: policy {name!r} has no {', '.join(unknown)}{hint}; it takes {takes}")
    return POLICIES[name](**arguments)


class DiffusionConfig(GenerationConfig):
    """How to fill a canvas: schedule, choice of tokens, cache policy, and what to record.

    Args:
        max_new_tokens: slots to fill (LLaDA: `gen_length`); 0 gives the prompt back. A list: by row.
        steps: passes in all; None: one per slot. With `threshold` or `factor` the most that are made. A list: by row.
        block_length: slots of a block of LLaDA's schedule; None: one block.
        schedule: "blocks" (LLaDA) or "time" (Dream); None: that of the model.
        eps: last time of Dream's schedule.
        confidence: which slots are decoded first: "probability" of the best token, "margin" to the
            second, negative "entropy", or "random" (`remasking`, `alg`).
        temperature: 0 takes the best token; above 0 tokens are drawn.
        top_p, top_k: tokens outside are neither drawn nor counted.
        selection_temperature: above 0 the slots are drawn by confidence (Dream: `alg_temp`).
        threshold: fill every slot of the block whose confidence is at least this, and always the surest one
            (Fast-dLLM): a probability or a margin, with "entropy" the negative entropy in nats.
        factor: fill the n surest slots of the block, n as large as (n + 1) (1 - c) < factor allows, where c is
            the confidence of the n-th (Fast-dLLM).
        cfg_scale: guidance: logits are l + cfg_scale (l - l'), l' with everything masked that was given (LLaDA).
            Both branches are computed, each with its own keys and values; 0: none.
        eos_token_id: id or ids. A row ends at its first one as soon as no mask stands before it, takes
            `pad_token_id` from there on and leaves the batch. None: every slot is filled, as published.
        pad_token_id: None: that of the model, or the first end id.
        cache: a policy, its name ("none", "decode", "greedy", "prefill", "pd", "prefix", "dual"), or a dict
            {"name": ..., "refresh": ...}; None: no cache.
        seed: of every random number; None: one a row, drawn from the generator. A list: by row.
        mask_token_id: id of a slot without a token; None: that of the model. It is never emitted.
        vocab_limit: ids from here on are never emitted (embeddings wider than the tokenizer).
        output_history, output_active, output_confidences, output_logits: record the canvas after
            every step, the slots that each pass computed, how sure it was of those it ranked, and the
            logits of those it computed.
        savings: `Savings`, which work is left out.

    Raises:
        ValueError: an unknown name (with the nearest known one), or an impossible value.

    Example:
        >>> DiffusionConfig(max_new_tokens=256, block_length=32, cache=dkv.Decode(refresh=8))
    """

    def __init__(self, **settings: Any):
        given = _canonical(settings)
        bookkeeping = {name: given.pop(name) for name in BOOKKEEPING if name in given}
        super().__init__(**bookkeeping)
        for name, default in DEFAULTS.items():
            setattr(self, name, given.get(name, default))
        self._build()
        self.validate()

    def update(self, **settings: Any) -> dict[str, Any]:
        """Set the given names, aliases included; unknown names are refused, so nothing is left over."""
        before = dict(vars(self))
        try:
            vars(self).update(_canonical(settings))
            self._build()
            self.validate()
        except Exception:
            vars(self).update(before)
            raise
        return {}

    def _build(self) -> None:
        """Make objects of what was given by name or as a dict."""
        self.cache = policy_of(self.cache)
        if isinstance(self.savings, dict):
            self.savings = Savings(**self.savings)

    def validate(self, **_: Any) -> None:
        """Raise ValueError where a value is impossible, naming the setting and what it may be."""
        if not hasattr(self, "savings"):  # transformers validates before our settings are there
            return
        check_numbers(self)
        if self.confidence not in CONFIDENCE_RULES:
            raise ValueError(f"confidence must be one of {', '.join(CONFIDENCE_RULES)}, got {self.confidence!r}")
        self._validate_dynamic()
        if self.schedule not in (None, "blocks", "time"):
            raise ValueError(f'schedule must be "blocks" or "time", got {self.schedule!r}')
        if self.schedule == "time" and self.block_length is not None:
            raise ValueError('block_length goes with schedule="blocks"; the time schedule has one block')
        lists = {name: len(value) for name in BY_ROW if isinstance(value := getattr(self, name), list)}
        if len(set(lists.values())) > 1:
            given = ", ".join(f"{count} of {name}" for name, count in lists.items())
            raise ValueError(f"settings by row must be one for every row of the batch, got {given}")
        for row in range(max(lists.values(), default=1)):
            self.plan(shifted=False, row=row)

    def _validate_dynamic(self) -> None:
        if not self.is_dynamic:
            return
        name, other = ("factor", "threshold") if self.threshold is None else ("threshold", "factor")
        if getattr(self, other) is not None:
            raise ValueError("threshold and factor are two rules for the same thing: give one of them")
        if self.confidence == "random" or (name == "factor" and self.confidence == "entropy"):
            raise ValueError(f"{name} needs a confidence to go by, which confidence={self.confidence!r} does not give")
        if self.selection_temperature > 0:
            raise ValueError(f"{name} fills the surest slots, selection_temperature draws them: give one of them")
        low, high = (-float("inf"), 0) if self.confidence == "entropy" else (0, 1)
        number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if name == "threshold" and not (number and low <= self.threshold <= high):
            given = f"confidence={self.confidence!r}, got {self.threshold!r}"
            raise ValueError(f"threshold must be between {low} and {high} with {given}")

    @property
    def is_dynamic(self) -> bool:
        """Whether confidences decide how many slots a step fills."""
        return self.threshold is not None or self.factor is not None

    def of_row(self, name: str, row: int) -> Any:
        """A setting of `BY_ROW` for one row."""
        value = getattr(self, name)
        return value[row] if isinstance(value, list) else value

    def plan(self, shifted: bool, row: int = 0, to_fill: int | None = None) -> list[Step]:
        """The steps, with the number of slots that each decodes; can be printed.

        Args:
            shifted: whether the model is of Dream's kind, whose own schedule is the one in time.
            row: of the batch, where settings are given row by row.
            to_fill: its slots to fill; default: its `max_new_tokens`.

        Raises:
            ValueError: fewer steps than blocks.
        """
        new = self.of_row("max_new_tokens", row) if to_fill is None else to_fill
        steps = self.of_row("steps", row) or new
        if new == 0:
            return []
        # Dream's own schedule has no blocks: asking for them asks for LLaDA's.
        default = "time" if shifted and self.block_length is None else "blocks"
        if (self.schedule or default) == "blocks":
            return block_schedule(new, steps, self.block_length or new)
        return time_schedule(new, steps, self.eps, by_chance=self.confidence == "random")

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, for JSON."""
        plain = super().to_dict()
        plain["cache"] = {"name": self.cache.name, **asdict(self.cache)}
        plain["savings"] = asdict(self.savings)
        return plain

    def settings(self) -> dict[str, Any]:
        """Our own settings alone, as plain values: what a result is recorded with."""
        plain = self.to_dict()
        return {name: plain[name] for name in DEFAULTS}

    def to_diff_dict(self) -> dict[str, Any]:
        """Our settings that differ from their defaults, and what transformers keeps for itself."""
        plain = self.to_dict()
        plain_defaults = {**DEFAULTS, "cache": {"name": "none"}, "savings": asdict(Savings())}
        names = (*DEFAULTS, *BOOKKEEPING)
        return {n: plain[n] for n in names if plain.get(n) is not None and plain[n] != plain_defaults.get(n)}


def _meant(name: str) -> str:
    """What an unknown setting may have been meant to be; the options of policies have a place of their own."""
    near = name if name in POLICY_OPTIONS else nearest(name, (*DEFAULTS, *ALIASES, *POLICY_OPTIONS))
    if near not in POLICY_OPTIONS:
        return instead(name, DEFAULTS, ALIASES)
    hint = "" if near == name else f"did you mean {near!r}? "
    return f'{hint}That is an option of the policy: cache={{"name": ..., "{near}": ...}}'


def _canonical(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings under our names; unknown and contradicting ones are refused."""
    given: dict[str, Any] = {}
    for name, value in settings.items():
        if name in FIXED:
            if value not in (None, FIXED[name]):
                raise ValueError(f"{name} can only be {FIXED[name]} here, got {value!r}")
            continue
        target, spelling = ALIASES.get(name, (name, {}))
        if target not in DEFAULTS and target not in BOOKKEEPING:
            if value is None or name.startswith("_"):  # transformers hands on its unset settings
                continue
            raise ValueError(f"unknown setting {name!r}; {_meant(name)}")
        value = spelling.get(value, value) if spelling else value
        if isinstance(value, np.generic):
            value = value.item()
        if target in (*BY_ROW, "eos_token_id") and isinstance(value, list | tuple | Tensor | np.ndarray):
            value = value.tolist() if hasattr(value, "tolist") else list(value)
        if (target == "eos_token_id" and value == []) or (value is None and target in NONE_IS_DEFAULT):
            value = DEFAULTS[target]
        if target in given and given[target] != value:
            raise ValueError(f"{name}={value!r} contradicts {target}={given[target]!r}: give one of them")
        given[target] = value
    return given
