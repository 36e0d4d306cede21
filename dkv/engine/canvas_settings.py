"""Settings of a model that denoises canvases (DiffusionGemma), under the names of transformers' generation config."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from dkv.core.naming import instead
from dkv.core.validation import flag, number, whole
from dkv.engine.config import DiffusionConfig
from dkv.engine.published_names import NO_EFFECT
from dkv.engine.settings import DEFAULTS, check_value
from dkv.policies import POLICY_OPTIONS, NoCache

_NO_MASKS = "this model has no masks: every token of a canvas may change in every step"
# Settings of models that fill masks, and why they mean nothing here.
REFUSED = {
    "cache": "in a canvas every token may change in every step, and with self-conditioning every input does, so no "
    "key or value of it can be kept; what stands before a canvas is cached exactly, always",
    "block_length": "the blocks are canvases, of the length that the model's configuration says",
    "schedule": "there is one schedule, by max_denoising_steps and entropy_bound",
    "threshold": f"{_NO_MASKS}; entropy_bound says how many tokens a step accepts",
    "temperature": "the temperature falls from t_max to t_min; both may be given",
    "top_p": "tokens are drawn from all of the vocabulary",
    "top_k": "tokens are drawn from all of the vocabulary",
    "cfg_scale": f"{_NO_MASKS}, so that a prompt cannot be masked for guidance",
    "logits_processor": "what a step thinks is the input of the next, so that its logits are not to be changed",
    "stopping_criteria": "a text ends at eos_token_id, after whole canvases",
    "output_logits": "logits of a canvas are made in pieces, and not kept",
}
# Names of DiffusionConfig that mean the same.
ALIASES = {"steps": "max_denoising_steps", "gen_length": "max_new_tokens"}
# Of transformers' own configuration: facts about a file, and what its generate does with memory.
IGNORED = {
    *("_from_model_config", "transformers_version", "return_dict_in_generate", "cache_implementation", "cache_config"),
    *("disable_compile", "bos_token_id", "_commit_hash", "_cls_name", "eot_token_id", "use_cache", *NO_EFFECT),
}


@dataclass(frozen=True)
class CanvasSettings:
    """How canvases are denoised; the defaults are those of transformers.

    Attributes:
        max_new_tokens: as many canvases are made as hold so many tokens; nothing is cut.
        max_length: columns of the prompt, padding included, and new tokens together, where `max_new_tokens` is not
            given.
        max_denoising_steps: passes over a canvas at most.
        entropy_bound: a step accepts tokens in ascending order of their entropy, in nats, while the sum of those before
            is at most this.
        t_min, t_max: the temperature falls linearly from t_max; a last step has t_min + (t_max - t_min) / steps.
        stability_threshold: a canvas is finished when its best tokens are those of so many steps before,
        confidence_threshold: and their mean entropy is below this.
        eos_token_id: ids that end a text. Given as None, those of the model; as [], none.
        pad_token_id: what stands behind the end; None: that of the model.
        seed: as for `DiffusionConfig`.
        kv_cache_dtype: as for `DiffusionConfig`.
        output_history: record the text after every step.
    """

    max_new_tokens: int = 256
    max_length: int | None = None
    max_denoising_steps: int = 48
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    seed: int | list[int] | None = None
    kv_cache_dtype: str = "auto"
    output_history: bool = False

    def __post_init__(self):
        whole("max_new_tokens", self.max_new_tokens, 0)
        whole("max_denoising_steps", self.max_denoising_steps, 1)
        whole("stability_threshold", self.stability_threshold, 0)
        for name in ("entropy_bound", "t_min", "t_max", "confidence_threshold"):
            number(name, getattr(self, name), 0, 10**6)
        if not self.t_min <= self.t_max or self.t_max == 0:
            raise ValueError(f"t_max must be above 0 and at least t_min ({self.t_min}), got {self.t_max}")
        for name in ("max_length", "pad_token_id"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 0)
        for one in self.eos_token_id:
            whole("eos_token_id", one, 0, listed=list(self.eos_token_id))
        for one in self.seed if isinstance(self.seed, list) else [] if self.seed is None else [self.seed]:
            whole("seed", one, -(2**63), 2**64 - 1)
        check_value("kv_cache_dtype", self.kv_cache_dtype)
        flag("output_history", self.output_history)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, for JSON."""
        return asdict(self)


NAMES = tuple(field.name for field in fields(CanvasSettings))
# Those that `dkv.DiffusionConfig` lacks.
OWN = ("max_denoising_steps", "t_min", "t_max", "stability_threshold", "confidence_threshold")


def settings_of(spec: Any, given: Any, overrides: Mapping[str, Any], columns: int = 0) -> CanvasSettings:
    """The settings of one call: those of the model's folder, then of a configuration, then by name.

    Args:
        spec: of the model.
        given: a `dkv.DiffusionConfig`, of which what differs from its defaults must mean something here; transformers'
            configuration of this model; settings by name; or None.
        columns: of the prompts, for `max_length`.

    Raises:
        TypeError: the configuration is none.
        ValueError: a setting is unknown, impossible, or means nothing for this model.
    """
    merged: dict[str, Any] = {}
    for part in (spec.generation, _plain(given), overrides):
        named = {ALIASES.get(name, name): value for name, value in part.items()}
        if isinstance(inner := named.pop("sampler_config", None), Mapping):
            named = {**inner, **named}
        if "max_new_tokens" in named or "max_length" in named:
            merged = {name: value for name, value in merged.items() if name not in ("max_new_tokens", "max_length")}
        merged |= {name: value for name, value in named.items() if _means_something(name, value)}
    longest = merged.get("max_length")
    if longest is not None and "max_new_tokens" not in merged:
        if longest <= columns:
            raise ValueError(f"max_length ({longest}) counts the prompt, too, which has {columns} columns: give more")
        merged["max_new_tokens"] = longest - columns
    ends = merged.get("eos_token_id", spec.ends)
    merged["eos_token_id"] = tuple(ends) if isinstance(ends, list | tuple) else (ends,)
    settings = CanvasSettings(**merged)
    for name, ids in {"eos_token_id": settings.eos_token_id, "pad_token_id": (settings.pad_token_id,)}.items():
        for one in ids:
            if one is not None and one >= spec.vocab_size:
                raise ValueError(f"{name} must be at most {spec.vocab_size - 1}, the last of the vocabulary, got {one}")
    pads = (settings.pad_token_id, spec.pad_token_id, 0)
    return replace(settings, pad_token_id=next(one for one in pads if one is not None))


def _plain(given: Any) -> Mapping[str, Any]:
    if given is None or isinstance(given, Mapping):
        return given or {}
    if isinstance(given, DiffusionConfig):
        # Its number of tokens is always meant, also where it is the default.
        length = {"max_new_tokens": given.max_new_tokens} if given.max_length is None else {}
        return {**length, **given.to_diff_dict()}
    if not hasattr(given, "max_denoising_steps"):
        raise TypeError(
            f"generation_config must be a dkv.DiffusionConfig, transformers' DiffusionGemmaGenerationConfig or a dict, "
            f"got {type(given).__name__}: or give settings by name"
        )
    found = {name: value for name, value in vars(given).items() if value is not None}
    if "sampler_config" in found:
        found["sampler_config"] = vars(found["sampler_config"])
    return found


def _means_something(name: str, value: Any) -> bool:
    """Whether a setting is to be taken; ValueError: it is refused, or not known."""
    if value is None or name in IGNORED:
        return False
    if name in NAMES:
        return True
    if name in DEFAULTS and (value == DEFAULTS[name] or isinstance(value, NoCache) or value == "none"):
        return False
    if name in REFUSED or name in DEFAULTS or name in POLICY_OPTIONS:
        raise ValueError(f"{name}={value!r} does not go with this model: {REFUSED.get(name, _NO_MASKS)}")
    raise ValueError(f"unknown setting {name!r}: {instead(name, NAMES)}")
