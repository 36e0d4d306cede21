"""The mask and the ends of a model whose configuration does not say them, from the files of its tokenizer."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dkv.models.files import is_there, read_json

ADDED, SETTINGS, MAP, ALL_IN_ONE = (
    *("added_tokens.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "tokenizer.json"),
)
# How mask tokens are written where no file says which token is the mask.
MASKS = ("<|mask|>", "<|mdm_mask|>", "|<MASK>|", "<[MASK_TOKEN]>", "<|MASK|>", "[MASK]", "<mask>", "<MASK>")
KINDS = ("mask", "eos", "pad")


def with_token_ids(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration with the ids of mask, end and padding that it lacks, as far as the folder has them.

    Ids outside the vocabulary are left out. Raises ValueError if a file is damaged.
    """
    lacks = [kind for kind in KINDS if config.get(f"{kind}_token_id") is None]
    if not lacks:
        return dict(config)
    files = {name: read_json(folder / name) for name in (ADDED, SETTINGS, MAP, ALL_IN_ONE) if is_there(folder / name)}
    ids, size = dict(_special(files)), config.get("vocab_size")
    found = dict(config)
    for kind in lacks:
        named = (files.get(name, {}).get(f"{kind}_token") for name in (SETTINGS, MAP))
        texts = [one.get("content") if isinstance(one, dict) else one for one in named]
        texts = [text for text in texts if isinstance(text, str)] or list(MASKS if kind == "mask" else ())
        known = [ids[text] for text in texts if text in ids]
        if known and (type(size) is not int or known[0] < size):
            found[f"{kind}_token_id"] = known[0]
    return found


def _special(files: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, int]]:
    """The texts and ids of tokens that are more than text; of two, the later counts."""
    added = files.get(ALL_IN_ONE, {}).get("added_tokens")
    listed = [(one.get("content"), one.get("id")) for one in added or () if isinstance(one, dict)]
    decoder = files.get(SETTINGS, {}).get("added_tokens_decoder")
    for number, one in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(one, dict) and number.isdecimal():
            listed.append((one.get("content"), int(number)))
    for text, number in (*listed, *files.get(ADDED, {}).items()):
        if isinstance(text, str) and type(number) is int and number >= 0:
            yield text, number
