"""From the words of lm-eval's tasks and `--model_args` to a `dkv.DiffusionConfig`."""

import logging
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from dkv.core.naming import instead
from dkv.engine.config import DiffusionConfig
from dkv.engine.published_names import ACTING, ALIASES, NO_EFFECT, OTHERS, own_name
from dkv.engine.settings import DEFAULTS
from dkv.policies import POLICY_OPTIONS, joined_policy

# Slots of an answer where neither task nor model_args say: what lm-eval's other models have.
NEW_TOKENS = 256
# What the number of slots may be called in a task.
WORDS = dict.fromkeys(("max_gen_toks", "max_tokens", "max_completion_tokens"), "max_new_tokens")
# What to do here instead of arguments that lm-eval's own models of Hugging Face have.
INSTEAD = {
    "dkv runs a model on one device, --device": (
        "parallelize device_map device_map_option max_memory_per_gpu max_cpu_memory offload_folder tp_plan gpus "
        "tensor_parallel_size data_parallel_size"
    ),
    "dkv runs weights in float32, bfloat16 or float16, given by dtype": (
        "load_in_8bit load_in_4bit quantization_config bnb_4bit_quant_type bnb_4bit_compute_dtype autogptq gptqmodel "
        "gguf_file softmax_dtype mixed_precision_dtype"
    ),
    "dkv loads no adapters: merge them into the weights, and give that folder as pretrained": "peft delta",
    "dkv takes the files that stand beside the weights: give a local folder as pretrained": (
        "revision subfolder tokenizer use_fast_tokenizer cache_dir"
    ),
    "dkv has its own way to compute, and DKV_BACKEND to choose it": (
        "attn_implementation use_flash_attention_2 backend logits_cache"
    ),
    "dkv always cuts the beginning of a prompt that is too long, and counts such prompts": "truncation",
    "dkv begins with the tokenizer's start token, or else its end token": "prefix_token_id",
    "dkv calls the chat template without arguments, and cuts answers at stop strings alone": (
        "think_end_token enable_thinking chat_template_args"
    ),
}
FOREIGN = {name: instead for instead, names in INSTEAD.items() for name in names.split()}
# Values of these with which lm-eval's models do nothing.
NOTHING = (None, False, "", "main", "default")
# What `dkv.integrations.lm_eval.harness.DkvLM` takes beside settings.
ARGUMENTS = ("pretrained", "dtype", "device", "batch_size", "add_bos_token", "mc_num", "is_check_greedy")

_LENGTH = "max_length counts the prompt, too, and dkv needs the slots to fill: give max_gen_toks"

log = logging.getLogger(__name__)


def count(name: str, value: int | str) -> int:
    """A number of at least 1, which lm-eval may hand on as text."""
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
        automatic = "; dkv does not search for it: give a number, such as 8" if str(value).startswith("auto") else ""
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}{automatic}")
    return int(value)


def known(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those of lm-eval's own models that ask for nothing, such as `parallelize=False`.

    Raises:
        ValueError: a name that is no setting and no option of a policy.
    """
    settings = {name: value for name, value in settings.items() if name not in FOREIGN or value not in NOTHING}
    names = (*DEFAULTS, *ALIASES, *ACTING, *POLICY_OPTIONS)
    for name, value in settings.items():
        if name in FOREIGN:
            raise ValueError(f"{name}={value!r} has no meaning here: {FOREIGN[name]}; leave {name} out")
        if name not in (*names, *NO_EFFECT, *OTHERS) and value is not None:
            raise ValueError(f"unknown setting {name!r}; {instead(name, DEFAULTS, (*names, *ARGUMENTS))}")
    return settings


def stated(settings: dict[str, Any]) -> dict[str, Any]:
    """Checked settings under the names of `DiffusionConfig`.

    Args:
        settings: under any name that `DiffusionConfig` knows; options of the policy beside `cache`.

    Raises:
        ValueError: an unknown name, or an impossible value.
    """
    plain = joined_policy(known(settings))
    for name, value in plain.items():
        if isinstance(value, list | tuple) and name not in ("eos_token_id", "eot_token_id"):
            raise ValueError(f"{name} must be one value for all requests, got {value!r}")
    if plain.get("max_length") is not None:
        raise ValueError(_LENGTH)
    if plain.get("seed", 0) is None:
        raise ValueError("seed must be a whole number; leave it out to take that of lm-eval")
    names = {own_name(name) for name in plain}
    # One slot: whether steps and blocks go with the length is seen when that is known.
    config = DiffusionConfig(**plain if "max_new_tokens" in names else {"max_new_tokens": 1, **plain})
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def task_config(asked: dict[str, Any], first: dict[str, Any], spec: Any) -> tuple[DiffusionConfig, list[str]]:
    """The settings and the stop strings of a task.

    Args:
        asked: `generation_kwargs` of the task with those of `--gen_kwargs`.
        first: from `stated`; these go before what is asked for, with a warning where they differ.
        spec: of the model.

    Raises:
        ValueError: settings that are unknown or do not go together, or more slots than the model has.
    """
    if "max_length" in asked:
        raise ValueError(_LENGTH)
    task = dict(normalize_gen_kwargs(asked, NEW_TOKENS))
    until, new, sampled = (task.pop(name) for name in ("until", "max_gen_toks", "do_sample"))
    if sampled:
        task.setdefault("temperature", 1.0)
    task = {"max_new_tokens": new, **stated(task)}
    told = {WORDS.get(name, own_name(name)) for name in joined_policy(asked)}
    for name in sorted(told & first.keys() & task.keys()):
        if task[name] != first[name]:
            log.warning("%s: %r of model_args is used, not %r of the task", name, first[name], task[name])
    config = DiffusionConfig(**{**task, **first})
    config.cache.check(spec.shifted)
    if config.max_new_tokens >= spec.max_positions:
        raise ValueError(
            f"{config.max_new_tokens} new tokens leave no room for a prompt: the model has {spec.max_positions} "
            "positions; give model_args max_new_tokens=N"
        )
    config.check_steps(spec.shifted)
    return config, [stop for stop in until if stop]
