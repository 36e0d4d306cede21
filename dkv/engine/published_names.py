"""Names of settings in transformers and in the published generate functions, and what becomes of them here.

A name that is not one of `dkv.DiffusionConfig` is one of these, or it is refused:

    ALIASES      another name of a setting
    CACHE_NAMES  a part of the cache policy: `published_caches.published_policy`
    OTHERS       nothing here answers to it: accepted with the value that changes nothing, else refused
    NO_EFFECT    says nothing about how to generate
"""

from collections.abc import Collection, Mapping
from typing import Any

from dkv.core.naming import instead, nearest
from dkv.core.validation import flag, plain
from dkv.engine.published_caches import CACHE_NAMES
from dkv.policies import POLICY_OPTIONS

ALIASES = {
    "gen_length": "max_new_tokens",
    "mask_id": "mask_token_id",
    "remasking": "confidence",
    "alg": "confidence",
    "alg_temp": "selection_temperature",
}
# Every published value of `remasking` and `alg`, and which rule it is; all three names take all of them.
CONFIDENCES = {
    "probability": "probability",
    "low_confidence": "probability",
    "maskgit_plus": "probability",
    "confidence_threshold": "probability",
    "margin": "margin",
    "topk_margin": "margin",
    "entropy": "entropy",
    "random": "random",
    "origin": "random",
    "sequential": "sequential",
}

# Kept for transformers, or said of a text by its tokenizer: no model here has token types, and nothing is compiled.
BOOKKEEPING = ("transformers_version", "bos_token_id")
NO_EFFECT = (
    "_from_model_config",
    "_commit_hash",
    "_original_object_hash",
    "token_type_ids",
    "special_tokens_mask",
    "offset_mapping",
    "disable_compile",
)

_BEAMS = "a canvas has no beams: for several answers repeat the prompt in the batch"
_PROCESSOR = "give logits_processor=, which takes those of transformers"
_CRITERIA = "give stopping_criteria=, which takes those of transformers"
_ASSISTANT = "no second model drafts here: several slots a step are filled with steps=, threshold= or factor="
_CACHE = "the cache is a policy: give cache=, such as dkv.DecodeCache(refresh=8)"
_HOOK = "give a streamer with put_draft(ids), or iterate over dkv.stream, to see every step"
_GENERATE = "it is an argument of dkv.generate"
_LENGTH = "every slot is filled: logits_eos_inf=True emits no end token, confidence_eos_eot_inf=True fills them last"

# name -> (values that change nothing, what to do instead). None, which is how transformers says unset, is one, too.
OTHERS: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_return_sequences": ((1,), "repeat the prompt in the batch; rows have seeds of their own"),
    "return_dict_in_generate": ((True,), "the tokens are output.sequences"),
    "output_scores": ((False,), "give output_logits=True or output_confidences=True"),
    "output_attentions": ((False,), "attention weights are never stored"),
    "output_hidden_states": ((False,), "hidden states are not kept"),
    "generation_tokens_hook_func": ((), _HOOK),
    "generation_logits_hook_func": ((), "give logits_processor=, (ids [n, length], scores [n, V]) -> scores"),
    "generation_kwargs": (({},), "give its settings by name"),
    "min_length": ((0,), _LENGTH),
    "min_new_tokens": ((0,), _LENGTH),
    "right_shift_logits": ((False,), "a family says whether its outputs are those of the next slot, and A2D's are not"),
    "eos_early_stop": ((False,), "give eos_token_id=, at whose first one a row ends"),
    "max_time": ((), _CRITERIA),
    "stop_strings": ((), _CRITERIA),
    "num_beams": ((1,), _BEAMS),
    "num_beam_groups": ((1,), _BEAMS),
    "early_stopping": ((False,), _BEAMS),
    "length_penalty": ((0.0, 1.0), _BEAMS),
    "diversity_penalty": ((0.0,), _BEAMS),
    "constraints": ((), _BEAMS),
    "force_words_ids": ((), _BEAMS),
    "low_memory": ((False,), _BEAMS),
    "min_p": ((0.0,), _PROCESSOR),
    "top_h": ((), _PROCESSOR),
    "typical_p": ((1.0,), _PROCESSOR),
    "epsilon_cutoff": ((0.0,), _PROCESSOR),
    "eta_cutoff": ((0.0,), _PROCESSOR),
    "repetition_penalty": ((1.0,), _PROCESSOR),
    "encoder_repetition_penalty": ((1.0,), _PROCESSOR),
    "no_repeat_ngram_size": ((0,), _PROCESSOR),
    "encoder_no_repeat_ngram_size": ((0,), _PROCESSOR),
    "bad_words_ids": (([],), _PROCESSOR),
    "renormalize_logits": ((False,), _PROCESSOR),
    "remove_invalid_values": ((False,), _PROCESSOR),
    "forced_bos_token_id": ((), _PROCESSOR),
    "forced_eos_token_id": ((), _PROCESSOR),
    "exponential_decay_length_penalty": ((), _PROCESSOR),
    "suppress_tokens": (([],), _PROCESSOR),
    "begin_suppress_tokens": (([],), _PROCESSOR),
    "sequence_bias": ((), _PROCESSOR),
    "watermarking_config": ((), _PROCESSOR),
    "prefix_allowed_tokens_fn": ((), _PROCESSOR),
    "token_healing": ((False,), "cut the last token off the prompt yourself"),
    "guidance_scale": ((1, 1.0), "give cfg_scale=, which is guidance_scale - 1"),
    "negative_prompt_ids": ((), "cfg_scale= guides away from the text without its prompt"),
    "negative_prompt_attention_mask": ((), "cfg_scale= guides away from the text without its prompt"),
    "dola_layers": ((), "only the last layer is decoded"),
    "penalty_alpha": ((0.0,), "contrastive search goes from left to right"),
    "cache_implementation": ((), f'{_CACHE}, and kv_cache_dtype="int8" for one in 8 bits'),
    "cache_config": ((), _CACHE),
    "max_cache_len": ((), _CACHE),
    "return_legacy_cache": ((False,), _CACHE),
    "past_key_values": ((), "give kv_cache=output.kv_cache of an earlier call"),
    "prefill_chunk_size": ((), "every pass sees the whole canvas"),
    "compile_config": ((), "nothing is compiled"),
    "continuous_batching_config": ((), "a batch is fixed when a call begins"),
    "synced_gpus": ((False,), "a model is on one device"),
    "assistant_model": ((), _ASSISTANT),
    "is_assistant": ((False,), _ASSISTANT),
    "num_assistant_tokens": ((20,), _ASSISTANT),
    "num_assistant_tokens_schedule": (("constant",), _ASSISTANT),
    "assistant_confidence_threshold": ((0.4,), _ASSISTANT),
    "assistant_early_exit": ((), _ASSISTANT),
    "assistant_ensemble_weight": ((), _ASSISTANT),
    "assistant_lookbehind": ((10,), _ASSISTANT),
    "target_lookbehind": ((10,), _ASSISTANT),
    "prompt_lookup_num_tokens": ((), _ASSISTANT),
    "max_matching_ngram_size": ((2,), _ASSISTANT),
    "speculation_type": ((), _ASSISTANT),
    "use_mtp": ((False,), _ASSISTANT),
    "decoder_start_token_id": ((), "there is no decoder apart from the prompt"),
    "position_ids": ((), "positions follow from attention_mask"),
    "inputs": ((), "give input_ids="),
    "inputs_embeds": ((), "give input_ids="),
    "prompt": ((), "give input_ids="),
    "tokenizer": ((), "encode the prompt first: dkv.generate(model, **tokenizer(text, return_tensors='pt'))"),
    "streamer": ((), _GENERATE),
    "stopping_criteria": ((), _GENERATE),
    "logits_processor": ((), _GENERATE),
    "generator": ((), _GENERATE),
    "attention_mask": ((), _GENERATE),
    "generation_config": ((), _GENERATE),
    "kv_cache": ((), _GENERATE),
}

# Names that act on a setting of another name, beside `ALIASES`.
ACTING = (*CACHE_NAMES, "do_sample")


def own_name(name: str) -> str:
    """The setting here that a name is, or is a part of; the name itself if it is none of those above."""
    return "cache" if name in CACHE_NAMES else "temperature" if name == "do_sample" else ALIASES.get(name, name)


def canonical(settings: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """The settings under the names in `own`, and those of `CACHE_NAMES` and `do_sample` as they are.

    None, which is how transformers says unset, is handed on where a setting is given under no other name.

    Raises:
        ValueError: a name is unknown or cannot be had, or a setting is given twice, differently.
    """
    given: dict[str, Any] = {}
    for name, value in settings.items():
        target = ALIASES.get(name, name)
        if target not in own and name not in ACTING:
            if value is not None and not check_other(name, value):
                raise ValueError(f"unknown setting {name!r}; {_meant(name, own)}")
            continue
        value = plain(value)
        if target == "confidence" and isinstance(value, str):
            value = CONFIDENCES.get(value, value)
        before = given.get(target)
        if before is not None and value not in (None, before):
            raise ValueError(f"{name}={value!r} contradicts {target}={before!r}: give one of them")
        given[target] = value if before is None else before
    return given


def _meant(name: str, own: Collection[str]) -> str:
    """What an unknown setting may have been meant to be; the options of policies have a place of their own."""
    near = name if name in POLICY_OPTIONS else nearest(name, (*own, *ALIASES, *ACTING, *POLICY_OPTIONS))
    if near not in POLICY_OPTIONS:
        return instead(name, own, (*ALIASES, *ACTING))
    hint = "" if near == name else f"did you mean {near!r}? "
    return f'{hint}That is an option of the policy: cache={{"name": ..., "{near}": ...}}'


def check_other(name: str, value: Any) -> bool:
    """Whether a name is one that changes nothing with this value; False: it is not known at all.

    Raises:
        ValueError: it is known, and would change the result.
    """
    if name in NO_EFFECT:
        return True
    if name not in OTHERS:
        return False
    neutral, instead = OTHERS[name]
    if value is None or any(_same(value, one) for one in neutral):
        return True
    only = f"can only be {' or '.join(map(repr, neutral))} here" if neutral else "is not a setting here"
    raise ValueError(f"{name} {only}, got {value!r}: {instead}")


def _same(value: Any, neutral: Any) -> bool:
    kinds = (int, float) if type(neutral) in (int, float) else (type(neutral),)
    return type(value) in kinds and value == neutral


def choose_temperature(given: dict[str, Any], current: float) -> None:
    """Let `do_sample` of transformers, among canonical settings, say whether tokens are drawn.

    Raises:
        ValueError: it contradicts the temperature beside it.
    """
    draws, heat = given.pop("do_sample", None), given.get("temperature")
    if draws is None:
        return
    if flag("do_sample", draws) and heat is None:
        heat = current or 1.0
    if heat is not None and draws != (heat != 0):
        which = "draws tokens" if draws else "takes the best token"
        raise ValueError(f"do_sample={draws} {which}, temperature={heat!r} does not: give one of them")
    given["temperature"] = heat if draws else 0.0
