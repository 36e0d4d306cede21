"""Text into token ids and back: batches of prompts, answers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# What ends a turn: LLaDA's name for it, and Dream's.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>")


def encode(tokenizer: Any, prompts: Sequence[str], chat: bool = False) -> tuple[Tensor, Tensor]:
    """Prompts as one batch, padded on the left.

    Args:
        prompts: at least one.
        chat: each prompt is the message of a user, put into the tokenizer's chat template.

    Returns:
        Token ids and attention mask, both int64 [B, P]. The ids at padding mean nothing.

    Raises:
        ValueError: there is no chat template, or no token for a character.
    """
    if chat:
        prompts = [talk_text(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    # A template writes the special tokens itself.
    rows = [ids_of(tokenizer, prompt, add_special_tokens=not chat) for prompt in prompts]
    return padded(rows, left=True)


def talk_text(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """Messages with role and content in the tokenizer's chat template, up to where the answer begins.

    Raises:
        ValueError: there is no template, or it does not take them.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the model's tokenizer has no chat template: give the prompt as it is")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # It raises what its author liked, mostly about the order of roles.
        raise ValueError(f"the chat template does not take these messages: {error}") from None


def padded(rows: Sequence[Sequence[int]], left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one batch, padded on the right or on the left: ids and attention mask, both int64 [B, L]."""
    width = max(map(len, rows), default=0)
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
    for number, row in enumerate(rows):
        slots = slice(width - len(row), width) if left else slice(len(row))
        ids[number, slots] = torch.tensor(row, dtype=torch.int64)
        mask[number, slots] = 1
    return ids, mask


def ids_of(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    """The token ids of a text.

    Raises:
        ValueError: there is no token for a character.
    """
    try:
        return tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    except Exception as error:
        # The tokenizers library has no error class for this.
        if "Missing [UNK] token" not in str(error):
            raise
        vocabulary = tokenizer.get_vocab()
        for special in tokenizer.all_special_tokens:
            text = text.replace(special, "")
        unknown = ", ".join(repr(c) for c in dict.fromkeys(text) if c not in vocabulary)
        known = "".join(sorted(token for token in vocabulary if len(token) == 1))
        raise ValueError(f"the model has no token for {unknown}; it knows the characters {known!r}") from None


def starts(tokenizer: Any) -> list[int]:
    """The id with which the tokenizer begins every text, if there is one."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def mask_text(tokenizer: Any, spec: Any) -> str | None:
    """How the tokenizer writes the mask, if a text with it is read as that one token."""
    text = tokenizer.decode([spec.mask_token_id])
    return text if text and tokenizer(text, add_special_tokens=False)["input_ids"] == [spec.mask_token_id] else None


def end_ids(tokenizer: Any, spec: Any) -> list[int] | None:
    """The ids that end a text, by the tokenizer or by the model's configuration; None: there are none."""
    return sorted({tokenizer.eos_token_id, spec.eos_token_id} - {None}) or None


def turn_end_ids(tokenizer: Any) -> list[int] | None:
    """The ids of the tokens that end a turn of a talk in the chat templates of the families; None: there are none."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in TURN_ENDS if token in vocabulary] or None


def until_end(tokenizer: Any, spec: Any, ids: Sequence[int]) -> list[int]:
    """The ids before the first that ends a text, by the tokenizer or by the model's configuration."""
    ends = end_ids(tokenizer, spec) or []
    return list(ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))])


def answer(tokenizer: Any, spec: Any, ids: Sequence[int], raw: bool = False) -> str:
    """New tokens as text: up to the end and without special tokens, or `raw`, all of them."""
    return tokenizer.decode(ids if raw else until_end(tokenizer, spec, ids), skip_special_tokens=not raw)


def filling_text(tokenizer: Any, ids: Sequence[int], raw: bool = False) -> str:
    """The tokens of a gap as text: all of them, without special tokens, or `raw` with these, and no space tidied."""
    return tokenizer.decode(ids, skip_special_tokens=not raw, clean_up_tokenization_spaces=False)
