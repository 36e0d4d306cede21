"""Which ids the tokenizer of a folder turns into text, read from its files without building it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dkv.models.files import damaged, is_there, read_json
from dkv.models.spec import ModelSpec


def with_vocab_limit(spec: ModelSpec, folder: Path) -> ModelSpec:
    """The spec with the number of ids up to the last that the tokenizer of the folder knows, if the model has more.

    Ids below that are taken to have text. The ends and the padding of the configuration stay below it.

    Raises:
        ValueError: a file of the tokenizer is damaged.
    """
    known = list(_known_ids(folder))
    if not known:
        return spec
    limit = 1 + max(*known, spec.eos_token_id or 0, spec.pad_token_id or 0)
    return replace(spec, vocab_limit=limit) if limit < spec.vocab_size else spec


def _known_ids(folder: Path) -> Iterator[int]:
    """The ids of the tokenizer in a folder; none if it has no vocabulary that can be read without its library."""
    base = [(name, ids) for name, ids in BASES if is_there(folder / name)][:1]
    for name, ids in [*base, *MORE] if base else []:
        if is_there(folder / name):
            for one in ids(read_json(folder / name)):
                if type(one) is not int or one < 0:
                    raise damaged(f"{folder / name} has a token with the id {one!r}")
                yield one


def _inside(content: dict[str, Any]) -> Iterator[Any]:
    """The ids of a `tokenizer.json`: of its vocabulary, and of tokens beside it."""
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary.values()
    elif isinstance(vocabulary, list):  # Unigram: the id of a token is its place
        yield from range(len(vocabulary))
    yield from (token.get("id") for token in added if isinstance(token, dict)) if isinstance(added, list) else ()


def _configured(content: dict[str, Any]) -> Iterator[Any]:
    """The ids of tokens that `tokenizer_config.json` adds, where they are names of fields."""
    added = content.get("added_tokens_decoder")
    yield from (int(i) if i.isdecimal() else i for i in added) if isinstance(added, dict) else ()


# The file of the vocabulary, of which the first counts, and those that add to it -> the ids in them.
BASES = (("tokenizer.json", _inside), ("vocab.json", dict.values))
MORE = (("added_tokens.json", dict.values), ("tokenizer_config.json", _configured))
