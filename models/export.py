"""Writing a checkpoint folder: weights and configuration in the format of their family, and a tokenizer."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file

from dkv.models.adapters import to_checkpoint
from dkv.models.transformer import Transformer

MASK_TOKENS = {"llada": "<|mdm_mask|>", "dream": "<|mask|>"}


def save_model(model: Transformer, folder: str | os.PathLike) -> None:
    """Write `config.json` and `model.safetensors` in the format of the model's family, in its dtype.

    Each file replaces an older one at once, when it is complete. Existing other files stay.

    Raises:
        ValueError: the format cannot express the model; nothing is written then.
    """
    config, tensors = to_checkpoint(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    _replace(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _write_json(folder / "config.json", config)


def save_tokenizer(folder: str | os.PathLike, alphabet: str, eos: int, mask: int, family: str = "llada") -> None:
    """Write a tokenizer with one token per character, which `transformers.AutoTokenizer` loads.

    `tokenizer.json` comes from the `tokenizers` library. `tokenizer_config.json` names the class, so
    that the model's own configuration, whose type transformers does not know, is not asked for it.

    A character outside the alphabet has no id of its own and none is borrowed: encoding it raises
    ("WordLevel error: Missing [UNK] token from the vocabulary").

    Args:
        folder: an existing folder.
        alphabet: the characters, whose ids are 0, 1, 2, ...
        eos: id of `<|endoftext|>`, which also pads.
        mask: id of the mask token, which each family writes in its own way.
        family: "llada" or "dream".
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    special = {"<|endoftext|>": eos, MASK_TOKENS[family]: mask}
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)} | special, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        "mask_token": MASK_TOKENS[family], "padding_side": "left", "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    _replace(Path(folder) / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    _write_json(Path(folder) / "tokenizer_config.json", config)


def _write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    _replace(path, lambda beside: beside.write_text(text, "utf-8"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then put the result in its place, so that a half-written file is never found."""
    beside = path.with_name(path.name + ".tmp")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
