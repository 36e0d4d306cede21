"""Every setting of a generation: its default, and what it may be."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from dkv.core.density import SIGMAS
from dkv.core.kv_cache import DTYPES
from dkv.core.validation import MOST, flag, number, whole
from dkv.kernels.choose import CONFIDENCE_DTYPES

# Rules by which the order of the slots is known before the pass.
ORDERS = ("random", "sequential")
CONFIDENCE_RULES = ("probability", "margin", "entropy", *ORDERS)
ENTROPY_FORMS = ("paper", "code")
QUOTAS = ("equal", "rounded")


@dataclass(frozen=True)
class Setting:
    """What a setting may be, beside its default.

    Attributes:
        default: None: it may be left out.
        kind: "whole", "number", "flag", "choice", or "" for what other modules check.
        low, high: of a number.
        listed: it may be a list of whole numbers.
        by_row: the list has one entry a row.
        choices: of a choice.
    """

    default: Any = None
    kind: str = ""
    low: float = 0
    high: float = MOST
    listed: bool = False
    by_row: bool = False
    choices: tuple[str, ...] = ()


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "max_new_tokens": Setting(128, "whole", listed=True, by_row=True),
        "max_length": Setting(None, "whole", 1),
        "steps": Setting(None, "whole", 1, listed=True, by_row=True),
        "block_length": Setting(None, "whole", 1),
        "schedule": Setting(),
        "quotas": Setting("equal", "choice", choices=QUOTAS),
        "most": Setting(None, "whole", 1),
        "eps": Setting(1e-3, "number", high=1),
        "confidence": Setting("probability", "choice", choices=CONFIDENCE_RULES),
        "confidence_dtype": Setting("exact", "choice", choices=CONFIDENCE_DTYPES),
        "temperature": Setting(0.0, "number", high=10**6),
        "top_p": Setting(None, "number", high=1),
        "top_k": Setting(None, "whole", 1),
        "selection_temperature": Setting(0.0, "number", high=10**6),
        "threshold": Setting(),
        "threshold_decay": Setting(0.0, "number", high=1),
        "certainty": Setting(None, "number", *SIGMAS),
        "near_threshold": Setting(),
        "radius": Setting(4, "whole"),
        "factor": Setting(None, "number", high=10**6),
        "entropy_bound": Setting(None, "number", high=10**6),
        "entropy_form": Setting("paper", "choice", choices=ENTROPY_FORMS),
        "edit_threshold": Setting(None, "number", high=1),
        "post_steps": Setting(16, "whole"),
        "cfg_scale": Setting(0.0, "number", high=10**6),
        "eos_token_id": Setting(None, "whole", listed=True),
        "eot_token_id": Setting(None, "whole", listed=True),
        "pad_token_id": Setting(None, "whole"),
        "logits_eos_inf": Setting(False, "flag"),
        "confidence_eos_eot_inf": Setting(False, "flag"),
        "cache": Setting(),
        "kv_cache_dtype": Setting("auto", "choice", choices=DTYPES),
        # The seeds that torch takes: others would be folded into these.
        "seed": Setting(None, "whole", -(2**63), 2**64 - 1, listed=True, by_row=True),
        "mask_token_id": Setting(None, "whole"),
        "vocab_limit": Setting(None, "whole", 1),
        "output_history": Setting(False, "flag"),
        "output_active": Setting(False, "flag"),
        "output_confidences": Setting(False, "flag"),
        "output_logits": Setting(False, "flag"),
    }
)
DEFAULTS: dict[str, Any] = {name: setting.default for name, setting in SETTINGS.items()}
# Settings that may be given row by row, as a list.
BY_ROW = tuple(name for name, setting in SETTINGS.items() if setting.by_row)


def check_value(name: str, value: Any) -> None:
    """Raise ValueError where the value of a setting is impossible, naming the setting and what it may be."""
    setting = SETTINGS[name]
    low, high = setting.low, setting.high
    if value is None and setting.default is None:
        return
    if setting.kind == "whole" and isinstance(value, list) and setting.listed:
        if not value and setting.by_row:
            raise ValueError(f"{name} is an empty list: give one number, or one for every row")
        for one in value:
            whole(name, one, low, high, value)
    elif setting.kind == "whole":
        whole(name, value, low, high)
    elif setting.kind == "number":
        number(name, value, low, high)
    elif setting.kind == "flag":
        flag(name, value)
    elif setting.kind == "choice" and value not in setting.choices:
        raise ValueError(f"{name} must be one of {', '.join(setting.choices)}, got {value!r}")
