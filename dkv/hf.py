"""Attention by name for the models of transformers: `attn_implementation="dkv"`.

Importing this module registers the name, and so does `dkv.register()`.

What a mask means here:
    None      every key is visible; a causal module sees no later key.
    [B, S]    False (or 0) hides a key from its row; a causal module sees no later key.
    4-D       the whole truth, of shape [B or 1, 1, N or 1, S]: causality is already in it.
Causal is what `is_causal` says, else the attribute of the attention module, as with flash attention.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from dkv.kernels import cached_attention

NAME = "dkv"

# Arguments that change neither what is attended to nor how: models hand on all that they were given.
HARMLESS = frozenset(
    {
        "position_ids", "cache_position", "cache", "past_key_values", "past_key_value", "use_cache", "return_dict",
        "output_hidden_states", "output_router_logits", "num_items_in_batch", "logits_to_keep", "deterministic",
        "max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k", "layer_idx",
    }
)  # fmt: skip

# Arguments that change the result in a way that the kernels do not know, and what to do instead.
_ELSEWHERE = 'load the model with attn_implementation="eager"'
REFUSED = {
    "softcap": _ELSEWHERE,
    "s_aux": _ELSEWHERE,
    "sinks": _ELSEWHERE,
    "head_mask": _ELSEWHERE,
    "layer_head_mask": _ELSEWHERE,
    "output_attentions": f"attention weights are never stored; to see them, {_ELSEWHERE}",
    "position_bias": 'load the model with attn_implementation="sdpa"',
    "indices": _ELSEWHERE,
    "block_indices": _ELSEWHERE,
    "block_table": 'continuous batching needs attn_implementation="paged|eager"',
}

# Arguments that cut a row into several sequences: a 4-D mask says the same, nothing else does.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens", "seq_idx")

# An additive mask hides a key by a number so low that its weight is 0; -10000 is the least that is in use.
HIDDEN = -1e4


def register() -> None:
    """Make `attn_implementation="dkv"` known to transformers. Twice does no harm.

    It serves every model that goes through transformers' `AttentionInterface`: encoders, bidirectional and causal
    decoders, with padding on either side, grouped key heads, sliding windows and a cache of keys. Queries that see
    nothing, which are padding, give 0. Gradients are right, computed by PyTorch. A model asks for more than that with
    a soft cap, attention sinks, dropout, a position bias, a mask per head or attention weights: these raise ValueError.

    Example:
        >>> dkv.register()
        >>> model = AutoModel.from_pretrained("answerdotai/ModernBERT-base", attn_implementation="dkv")
        >>> hidden = model(**tokenizer(texts, padding=True, return_tensors="pt")).last_hidden_state

        A decoder turned into an encoder:

        >>> model = AutoModel.from_pretrained("meta-llama/Llama-3.2-1B", attn_implementation="dkv", is_causal=False)
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)


def make_mask(
    batch_size: int,
    *,
    kv_length: int,
    kv_offset: int = 0,
    mask_function=masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    q_length: int | None = None,
    q_offset: int | Tensor | None = None,
    cache_position: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **how,
) -> Tensor | None:
    """The mask of a model, in the cheapest form that `attention` takes; transformers calls it.

    Args:
        kv_length, kv_offset: number of keys, and the position of the first.
        mask_function: the pattern; causal and bidirectional ones need no mask of pairs.
        attention_mask: [B, at least S] bool, False at padding.
        q_length, q_offset: number of queries, and the position of the first; before transformers 5.3
            these came as `cache_position` [N].
        allow_is_causal_skip, allow_is_bidirectional_skip: False where the model needs a 4-D mask.
        how: other arguments of transformers' mask functions.

    Returns:
        None, bool [B, S], bool [B, 1, 1, S] or bool [B, 1, N, S]; see the top of this file.
    """
    queries = cache_position.shape[0] if q_length is None else q_length
    padding_fits = attention_mask is None or (attention_mask.dim() == 2 and attention_mask.shape[1] == kv_length)
    if padding_fits and kv_offset == 0:
        if mask_function is masking_utils.causal_mask_function and allow_is_causal_skip:
            if _at_the_end(queries, q_offset, kv_length):
                return attention_mask
        elif mask_function is _BIDIRECTIONAL and allow_is_bidirectional_skip:
            return None if attention_mask is None else attention_mask[:, None, None]
    place = {"cache_position": cache_position} if q_length is None else {"q_length": q_length, "q_offset": q_offset or 0}
    return masking_utils.sdpa_mask(
        batch_size=batch_size, kv_length=kv_length, kv_offset=kv_offset, mask_function=mask_function,
        attention_mask=attention_mask, allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **place, **how,
    )  # fmt: skip


_BIDIRECTIONAL = getattr(masking_utils, "bidirectional_mask_function", None)  # since transformers 5.0


def _at_the_end(queries: int, offset: int | Tensor | None, keys: int) -> bool:
    """The last query stands at the last key. Not so with a static cache, which is longer than what it holds."""
    if offset is None:
        return queries == keys  # positions on the device, which are not read
    return not isinstance(offset, Tensor) and offset + queries == keys


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
        module: asked for `is_causal` when the argument is None; without one it is causal.
        query: [B, Hq, N, D]; query i stands at key i + S - N where no 4-D mask says otherwise.
        key, value: [B, Hkv, S, D]; Hq is a multiple of Hkv.
        attention_mask: None, [B, S] bool or integers, or [B or 1, 1, N or 1, S] bool or additive: 0, or -10000
            and less. An additive mask is read back to be checked: bool is quicker.
        scaling: factor of the scores; default D ** -0.5.
        sliding_window: must be in the mask already.

    Returns:
        [B, N, Hq, D], and None for the attention weights.

    Raises:
        ValueError: an argument that would change the result and is not supported, or shapes that do not fit.
    """
    _refuse(kwargs, dropout, whole=attention_mask is not None and attention_mask.dim() == 4)
    if key.shape[-1] != value.shape[-1]:
        raise ValueError(
            f"attn_implementation 'dkv' needs keys and values of one head size, got {key.shape[-1]} and "
            f'{value.shape[-1]}: load the model with attn_implementation="sdpa"'
        )
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    # Views: the heads of a token stand together in memory in most models.
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    rules = _rules(attention_mask, query.shape[:2], key.shape[1])
    if attention_mask is None or attention_mask.dim() == 2:
        if sliding_window is not None and key.shape[1] > sliding_window:
            raise ValueError(
                f"sliding_window={sliding_window} is not in attention_mask, which is not 4-D: make the mask with "
                "transformers.masking_utils.create_sliding_window_causal_mask, or give a 4-D bool mask"
            )
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # One query stands at the last key and sees them all.
        if causal and query.shape[1] > 1:
            rules["block_ids"] = _causal(query, key)
    return cached_attention(query, key, value, scale=scaling, **rules), None


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
        remedy = REFUSED.get(name)
        if name in PACKED:
            remedy = "give a 4-D bool mask that keeps the packed sequences apart, or one sequence a row with padding"
        if remedy is None:
            remedy = f"leave the argument out if it does not matter, else {_ELSEWHERE}"
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
            f"or additive, got {list(mask.shape)} {mask.dtype}; a mask per head is not supported: {_ELSEWHERE}"
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
    if torch.compiler.is_compiling() or mask.requires_grad or not bool((visible | (mask <= HIDDEN)).all()):
        raise ValueError(
            "an additive attention_mask must be 0 or at most -10000 everywhere (a bias on the scores is not supported: "
            f"{_ELSEWHERE}), need no gradient, and under torch.compile be bool: give attention_mask == 0"
        )
    return visible


register()
