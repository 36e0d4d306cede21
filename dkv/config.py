"""Settings of a generation, in transformers' form and under the names of both model families."""

import difflib
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import GenerationConfig

from dkv.policies import POLICIES, NoCache, Policy
from dkv.schedule import Step, block_schedule, time_schedule

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
FIXED: dict[str, Any] = {"cfg_scale": 0.0, "num_return_sequences": 1, "return_dict_in_generate": True}

# What transformers writes into generation_config.json files for its own use.
BOOKKEEPING = ("transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "do_sample")


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
        raise ValueError(f"cache: unknown policy {name!r}; known are {', '.join(POLICIES)}")
    known = {f.name for f in fields(POLICIES[name])}
    if unknown := sorted(set(arguments) - known):
        takes = ", ".join(sorted(known)) or "no arguments"
        raise ValueError(f"cache: policy {name!r} has no {', '.join(unknown)}; it takes {takes}")
    return POLICIES[name](**arguments)


class DiffusionConfig(GenerationConfig):
    """How to fill a canvas: schedule, choice of tokens, cache policy, and what to record.

    Args:
        max_new_tokens: slots to fill (LLaDA: `gen_length`); 0 gives the prompt back.
        steps: passes in all; None: one per slot.
        block_length: slots of a block of LLaDA's schedule; None: one block.
        schedule: "blocks" (LLaDA) or "time" (Dream); None: that of the model.
        eps: last time of Dream's schedule.
        confidence: which slots are decoded first: "probability" of the best token, "margin" to the
            second, negative "entropy", or "random" (`remasking`, `alg`).
        temperature: 0 takes the best token; above 0 tokens are drawn.
        top_p, top_k: tokens outside are neither drawn nor counted.
        selection_temperature: above 0 the slots are drawn by confidence (Dream: `alg_temp`).
        cache: a policy, its name ("none", "decode", "greedy", "prefill", "pd"), or a dict
            {"name": ..., "refresh": ...}; None: no cache.
        seed: of every random number; None: drawn from the generator.
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
        self.cache = policy_of(self.cache)
        if isinstance(self.savings, dict):
            self.savings = Savings(**self.savings)
        self.validate()

    def update(self, **settings: Any) -> dict[str, Any]:
        """Set the given names, aliases included; unknown names are refused, so nothing is left over."""
        for name, value in _canonical(settings).items():
            setattr(self, name, policy_of(value) if name == "cache" else value)
        self.validate()
        return {}

    def validate(self, **_: Any) -> None:
        """Raise ValueError where a value is impossible, naming the setting and what it may be."""
        if not hasattr(self, "savings"):  # transformers validates before our settings are there
            return
        for name, low in (("max_new_tokens", 0), ("steps", 1), ("block_length", 1), ("top_k", 1)):
            value = getattr(self, name)
            if value is None and name != "max_new_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
        highest = {"temperature": float("inf"), "selection_temperature": float("inf"), "top_p": 1, "eps": 1}
        for name, high in highest.items():
            value = getattr(self, name)
            if value is not None and not 0 <= value <= high:
                raise ValueError(f"{name} must be between 0 and {high}, got {value!r}")
        if self.confidence not in CONFIDENCE_RULES:
            raise ValueError(f"confidence must be one of {', '.join(CONFIDENCE_RULES)}, got {self.confidence!r}")
        if self.schedule not in (None, "blocks", "time"):
            raise ValueError(f'schedule must be "blocks" or "time", got {self.schedule!r}')
        if self.schedule == "time" and self.block_length is not None:
            raise ValueError('block_length goes with schedule="blocks"; the time schedule has one block')
        self.plan(shifted=False)

    def plan(self, shifted: bool) -> list[Step]:
        """The steps, with the number of slots that each decodes; can be printed.

        Args:
            shifted: whether the model is of Dream's kind, whose own schedule is the one in time.

        Raises:
            ValueError: fewer steps than blocks.
        """
        new, steps = self.max_new_tokens, self.max_new_tokens if self.steps is None else self.steps
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
            near = difflib.get_close_matches(name, (*DEFAULTS, *ALIASES), 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(DEFAULTS)}"
            raise ValueError(f"unknown setting {name!r}{hint}")
        value = spelling.get(value, value) if spelling else value
        if target in given and given[target] != value:
            raise ValueError(f"{name}={value!r} contradicts {target}={given[target]!r}: give one of them")
        given[target] = value
    return given
