"""Writing a checkpoint folder: weights and configuration in the format of their family, and a tokenizer."""

import errno
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dkv.common import files
from dkv.models.families import FAMILIES
from dkv.models.folders import CONFIG, WEIGHTS
from dkv.models.packing import PackedLinear
from dkv.models.transformer import Transformer

FORM: dict[str, Any] = {"indent": 2, "sort_keys": True}
MASK_TOKENS = {"llada": "<|mdm_mask|>", "dream": "<|mask|>", "sdar": "<|MASK|>"}


def save_model(model: Transformer, folder: str | os.PathLike) -> None:
    """Write `config.json` and `model.safetensors` in the format of the model's family, in its dtype.

    Each file replaces an older one at once, when it is complete. Existing other files stay.

    Raises:
        ValueError: the format cannot express the model; nothing is written then.
        OSError: a file cannot be written.
    """
    config, tensors = to_checkpoint(model)
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    with files.writing(Path(folder, WEIGHTS)) as part:
        try:
            save_file(tensors, part, metadata={"format": "pt"})
        except SafetensorError as error:
            # A full disk among others, which is no error of the system's there.
            raise OSError(errno.EIO, str(error)) from error
    files.write_json(Path(folder, CONFIG), config, **FORM)


def save_tokenizer(folder: str | os.PathLike, alphabet: str, eos: int, mask: int, family: str = "llada") -> None:
    """Write a tokenizer with one token per character, which `transformers.AutoTokenizer` loads.

    `tokenizer_config.json` names the class, so that the model's own configuration, whose type transformers does not
    know, is not asked for it. A character outside the alphabet has no id: encoding it raises ("WordLevel error: Missing
    [UNK] token from the vocabulary").

    Args:
        folder: made if it is missing.
        alphabet: the characters, whose ids are 0, 1, 2, ...
        eos: id of `<|endoftext|>`, which also pads.
        mask: id of the mask token, which each family writes in its own way.
        family: "llada", "dream" or "sdar".
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    special = {"<|endoftext|>": eos, MASK_TOKENS[family]: mask}
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)} | special, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>"),
        "mask_token": MASK_TOKENS[family],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    with files.writing(Path(folder, "tokenizer.json")) as part:
        tokenizer.save(str(part))
    files.write_json(Path(folder, "tokenizer_config.json"), config, **FORM)


def to_checkpoint(model: Transformer) -> tuple[dict, dict[str, Tensor]]:
    """The model as a checkpoint of its family: the content of `config.json`, and the tensors by their names there.

    The tensors share the storage of the model's, but for fused ones. `family_of(config).spec(config) == model.spec`.

    Raises:
        ValueError: the format cannot express the model, or its weights are packed.
    """
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError("packed weights cannot be saved: call dkv.unpack(model), or load the model with pack=False")
    spec, family = model.spec, FAMILIES[model.spec.family]
    # By the names of plain layers, also where products are joined; a head that is the embedding is written once.
    tensors = {n: t for n, t in model.state_dict().items() if not (spec.tied_head and n == "head.weight")}
    pieces = family.pieces({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    config = {**family.config(spec), "torch_dtype": str(model.dtype).removeprefix("torch.")}
    # The limit comes from a tokenizer, not from the configuration.
    again = replace(family.spec(config), vocab_limit=spec.vocab_limit)
    for name in (field.name for field in fields(spec) if field.compare):
        ours, theirs = getattr(spec, name), getattr(again, name)
        if ours != theirs:
            raise ValueError(f"the {family.name} format cannot express {name}={ours!r}, only {theirs!r}")
    parts = {theirs: [tensors[part.parameter][part.at] for part in parts] for theirs, parts in pieces.items()}
    return config, {theirs: few[0] if len(few) == 1 else torch.cat(few) for theirs, few in parts.items()}
