"""Attention by name for the models of transformers: `attn_implementation="dkv"`.

Importing this module registers the name, and so does `dkv.register()`.

What a mask means here:
    None      every key is visible, as in eager attention; but a causal module sees no later key.
    [B, S]    False (or 0) hides a key from its row; and a causal module sees no later key.
    4-D       the whole truth, of shape [B or 1, 1, N or 1, S]: causality is already in it.
The flag `is_causal` of an attention module is believed only in models whose attention always sets it (see
`kind_of_masks`): for these alone a causal mask is left out, and every other model is given it whole.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, masking_utils

from dkv.integrations.hf_support import ELSEWHERE, NAME, kind_of_masks, made_an_encoder, watch_models
from dkv.kernels import cached_attention

# Arguments that change neither what is attended to nor how: models hand on all that they were given.
HARMLESS = {
    *("position_ids", "cache_position", "position_embeddings", "layer_idx", "deterministic", "num_items_in_batch"),
    *("cache", "past_key_values", "past_key_value", "use_cache"),
    *("return_dict", "output_hidden_states", "output_router_logits", "logits_to_keep"),
    *("max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k", "max_seqlen"),
    *("labels", "shift_labels", "token_type_ids", "mm_token_type_ids"),
}

# Arguments that cut a row into several sequences: a 4-D mask says the same, nothing else does.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens", "seq_idx")

# Arguments that change the result in a way that the kernels do not know, and what to do instead.
_BY_EAGER = ("softcap", "s_aux", "sinks", "head_mask", "layer_head_mask", "indices", "block_indices")
_WHOLE = "give a 4-D bool mask that keeps the packed sequences apart, or one sequence a row with padding"
REFUSED = {
    **dict.fromkeys(_BY_EAGER, ELSEWHERE),
    **dict.fromkeys(PACKED, _WHOLE),
    "output_attentions": f"attention weights are never stored; to see them, {ELSEWHERE}",
    "position_bias": 'load the model with attn_implementation="sdpa"',
    "block_table": 'continuous batching needs attn_implementation="paged|eager"',
}

# An additive mask hides a key by a number so low that its weight is 0; -10000 is the least that is in use.
HIDDEN = -1e4


def register() -> None:
    """Make `attn_implementation="dkv"` known to transformers. Twice does no harm.

    It serves every model that goes through transformers' `AttentionInterface`: encoders, bidirectional and causal
    decoders, with padding on either side, grouped key heads, sliding windows and a cache of keys. Queries that see
    nothing, which are padding, give 0. Gradients are right, computed by PyTorch. A model asks for more than that with
    a soft cap, attention sinks, dropout, a position bias, a mask per head or attention weights: these raise ValueError.
    Models whose attention does not go through the interface raise it when they are built, as transformers' own names
    do; for that, two methods of `PreTrainedModel` are wrapped.

    Example:
        >>> dkv.register()
        >>> model = AutoModel.from_pretrained("answerdotai/ModernBERT-base", attn_implementation="dkv")
        >>> hidden = model(**tokenizer(texts, padding=True, return_tensors="pt")).last_hidden_state

        A decoder turned into an encoder; with transformers 4, set `is_causal` of its attention modules to False, and
        give a 4-D mask where there is padding:

        >>> config = AutoConfig.from_pretrained("meta-llama/Llama-3.2-1B")
        >>> config.is_causal = False
        >>> model = AutoModel.from_pretrained("meta-llama/Llama-3.2-1B", config=config, attn_implementation="dkv")
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)
    watch_models()


def make_mask(
    batch_size: int,
    *,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **asked: Any,
) -> Tensor | None:
    """The mask of a model, in the cheapest form that `attention` takes; transformers calls it.

    Args:
        allow_is_causal_skip, allow_is_bidirectional_skip: whether the pattern, but for its window, is causal or
            without any limit.
        asked: the other arguments of transformers' mask functions. `attention_mask`, [B, S] bool, False at padding, is
            read back once, as for sdpa, so that a mask that hides nothing costs nothing; not while compiling or
            capturing. Older versions of transformers give the positions of the queries, `cache_position` [N], and newer
            ones `q_length` and `q_offset`.

    Returns:
        None, bool [B, 1, 1, S] or bool [B, 1, N, S]; see the top of this file. For models that transformers never
        runs with bool masks, what it makes for eager attention: additive, of the dtype of the model.

    Raises:
        ValueError: the attention of the model does not go through `AttentionInterface`.
    """
    config, mask, keys = asked.get("config"), asked.get("attention_mask"), asked["kv_length"]
    takes_bool, flags = kind_of_masks(type(config))
    offset, queries = asked.get("q_offset"), asked.get("q_length")
    if queries is None:
        queries = len(asked["cache_position"])
    elif offset is None:
        asked["q_offset"] = 0
    if not takes_bool:
        how = {"allow_is_bidirectional_skip": allow_is_bidirectional_skip}
        return masking_utils.eager_mask(batch_size=batch_size, **how, **asked)
    window = asked.get("local_size")
    plain = (window is None or keys < window) and asked.get("kv_offset", 0) == 0
    if plain and (mask is None or mask.shape == (batch_size, keys)):
        encoder = made_an_encoder(config)
        if allow_is_bidirectional_skip:
            unlimited, left_out = True, encoder or not flags
        else:
            unlimited = allow_is_causal_skip and _at_the_end(queries, offset, keys)
            left_out = queries == 1 or (flags and not encoder)
        if unlimited and left_out and _hides_nothing(mask):
            return None
        if allow_is_bidirectional_skip and mask is not None:
            return mask[:, None, None]
    how = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return masking_utils.sdpa_mask(batch_size=batch_size, **how, **asked)


def _at_the_end(queries: int, offset: int | Tensor | None, keys: int) -> bool:
    """The last query stands at the last key. Not so with a static cache, which is longer than what it holds."""
    if offset is None:
        return queries == keys  # positions on the device, which are not read
    return not isinstance(offset, Tensor) and offset + queries == keys


def _hides_nothing(mask: Tensor | None) -> bool:
    """The mask is None or all True; False where it must not be read."""
    if mask is None:
        return True
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(mask) is not Tensor:
        return False
    if mask.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    return bool(mask.all())


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention of a module of transformers, by `dkv.kernels.cached_attention`; transformers calls it.

    Other keyword arguments are ignored where they are None, False or in `HARMLESS`. Those in `REFUSED` and those that
    are not known raise, so that nothing a model asks for is left out in silence.

    Args:
        module: asked for `is_causal`, and for its `config`, where no 4-D mask says what is visible.
        query: [B, Hq, N, D]; query i stands at key i + S - N where no 4-D mask says otherwise.
        key, value: [B, Hkv, S, D]; Hq is a multiple of Hkv.
        attention_mask: None, [B, S] bool or integers, or [B or 1, 1, N or 1, S] bool or additive: 0, or -10000
            and less. An additive mask is read back to be checked: bool is quicker.
        scaling: factor of the scores; default D ** -0.5.
        is_causal: stands for the attribute of the module; only for modules that are causal else.
        sliding_window: must be in the mask already.

    Returns:
        [B, N, Hq, D], and None for the attention weights.

    Raises:
        ValueError: an argument that would change the result and is not supported, or shapes that do not fit.
    """
    if getattr(getattr(module, "config", None), "output_attentions", False):
        kwargs["output_attentions"] = True
    _refuse(kwargs, dropout, whole=attention_mask is not None and attention_mask.dim() == 4)
    if key.shape[-1] != value.shape[-1]:
        raise ValueError(
            f"attn_implementation 'dkv' needs keys and values of one head size, got {key.shape[-1]} and "
            f'{value.shape[-1]}: load the model with attn_implementation="sdpa"'
        )
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    # Views: the heads of a token stand together in memory in most models.
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    rules = _rules(attention_mask, query.shape[:2], key.shape[1])
    if attention_mask is None or attention_mask.dim() == 2:
        if sliding_window is not None and key.shape[1] > sliding_window and not _is_denoiser(module, attention_mask):
            raise ValueError(
                f"sliding_window={sliding_window} is not in attention_mask, which is not 4-D: make the mask with "
                "transformers.masking_utils.create_sliding_window_causal_mask, or give a 4-D bool mask"
            )
        # One query stands at the last key and sees them all.
        if query.shape[1] > 1 and _is_causal(module, is_causal):
            rules["block_ids"] = _causal(query, key)
    return cached_attention(query, key, value, scale=scaling, **rules), None


def _is_denoiser(module: nn.Module | None, mask: Tensor | None) -> bool:
    """Whether a module without a mask is of DiffusionGemma's denoiser, which sees all of a cache cut to the window."""
    kind = getattr(getattr(module, "config", None), "model_type", None)
    return mask is None and kind == "diffusion_gemma_text" and module.is_causal is False


def _is_causal(module: nn.Module | None, asked: bool | None) -> bool:
    """Whether a module without a 4-D mask sees no later key.

    `make_mask` leaves a causal mask out for models with known flags only: anywhere else no mask is no limit, as for
    eager attention, whatever the flag says.
    """
    config, flag = getattr(module, "config", None), getattr(module, "is_causal", None)
    if not isinstance(config, PretrainedConfig):
        return bool(flag if asked is None else asked)
    if asked is False or made_an_encoder(config) or not kind_of_masks(type(config))[1]:
        return False
    if flag is None:
        raise ValueError(
            f"attn_implementation 'dkv' cannot tell whether {type(module).__name__} is causal: set its attribute "
            "is_causal to True or False, or give a 4-D bool attention_mask"
        )
    return flag


def _refuse(kwargs: dict, dropout: float, whole: bool) -> None:
    """Raise for the arguments that would change the result; `whole`: the mask says what is visible, all of it."""
    if dropout > 0:
        raise ValueError(
            f"attn_implementation 'dkv' has no dropout, got {dropout}: call model.eval(), or set attention_dropout "
            "(attention_probs_dropout_prob, attn_pdrop) of the config to 0 for training"
        )
    for name, given in kwargs.items():
        if given is None or given is False or name in HARMLESS or (whole and name in PACKED):
            continue
        remedy = REFUSED.get(name, f"leave the argument out if it does not matter, else {ELSEWHERE}")
        raise ValueError(f"attn_implementation 'dkv' does not support {name}: {remedy}")


def _causal(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the queries [B, N] and of the keys [B, S], the last of each standing together."""
    slots = torch.arange(key.shape[1], device=key.device, dtype=torch.int32).expand(len(key), -1)
    return slots[:, key.shape[1] - query.shape[1] :], slots


def _rules(mask: Tensor | None, queries: tuple[int, int], keys: int) -> dict[str, Tensor | tuple]:
    """The arguments of `cached_attention` that a mask stands for."""
    if mask is None:
        return {}
    if mask.dim() == 2 and not mask.is_floating_point():
        return {"key_mask": mask.bool()}
    batch, n = queries
    fits = mask.dim() == 4 and all(
        have in sizes for have, sizes in zip(mask.shape, ((1, batch), (1,), (1, n), (keys,)), strict=True)
    )
    if not fits:
        raise ValueError(
            f"attention_mask must be [{batch}, {keys}] bool or integers, or [{batch} or 1, 1, {n} or 1, {keys}] bool "
            f"or additive, got {list(mask.shape)} {mask.dtype}; a mask per head is not supported: {ELSEWHERE}"
        )
    visible = _boolean(mask)[:, 0].expand(batch, -1, -1)
    return {"key_mask": visible[:, 0]} if mask.shape[2] == 1 else {"mask": visible}


def _boolean(mask: Tensor) -> Tensor:
    """A 4-D mask as bool."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise ValueError(f"a 4-D attention_mask must be bool or additive, got {mask.dtype}: give attention_mask.bool()")
    visible = mask == 0
    if mask.requires_grad or not _hides_nothing(visible | (mask <= HIDDEN)):
        raise ValueError(
            "an additive attention_mask must be 0 or at most -10000 everywhere (a bias on the scores is not supported: "
            f"{ELSEWHERE}), need no gradient, and under torch.compile be bool: give attention_mask == 0"
        )
    return visible


register()
