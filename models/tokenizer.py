"""The tokenizer of a checkpoint folder, without code of theirs; and the ids it knows, read without building it."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dkv.models.families import family_of
from dkv.models.files import damaged, is_there, read_json, read_text, some
from dkv.models.folders import CONFIG, TOKENIZER_FILES, folder_of
from dkv.models.keywords import hub_options
from dkv.models.spec import ModelSpec

ALL_IN_ONE, WORDS, MERGES, SETTINGS = "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"
JSON = (ALL_IN_ONE, WORDS, CONFIG, SETTINGS, "special_tokens_map.json", "added_tokens.json")
TEXT = (MERGES, "vocab.txt", "chat_template.jinja", "chat_template.json")
# Vocabularies in other formats, which are left to transformers.
OTHER = ("vocab.txt", "*.model", "*.tiktoken")
# The class that Dream's folders name and bring along, and which is Qwen2's.
DREAMS = (None, "DreamTokenizer", "DreamTokenizerFast")


def load_tokenizer(path_or_id: str | os.PathLike, *, subfolder: str | None = "", **keywords: Any) -> Any:
    """The tokenizer that comes with a checkpoint. No code of the checkpoint is run; no weight is read.

    Args:
        path_or_id: as for `dkv.load`: "tiny", "tiny-dream", a folder, or the id of a model on the hub, of which only
            the small files are fetched.
        subfolder, keywords: as for `dkv.load`.

    Returns:
        A tokenizer of transformers. A `tokenizer.json` is taken as it stands, whatever class the folder names. Dream's
        `vocab.json` and `merges.txt` are Qwen2's, under the name of a class of its own.

    Raises:
        FileNotFoundError: there is no such folder, or no complete vocabulary in it.
        ValueError: a file is damaged, or transformers cannot read it; the message names it.
        OSError: a file cannot be read.
        TypeError: an unknown argument, or a path that is none.

    Example:
        >>> tokenizer = dkv.load_tokenizer("tiny")
        >>> tokenizer.apply_chat_template(messages, add_generation_prompt=True)  # where it has a template
    """
    folder = folder_of(path_or_id, TOKENIZER_FILES, subfolder=subfolder, **hub_options(keywords, ("subfolder",)))
    files = _checked_files(folder)
    reasons = []
    for kind in _classes(files):
        try:
            with _quiet():
                tokenizer = kind.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
                tokenizer(" ")  # some settings of the wrong kind show when they are used
            break
        # transformers raises several kinds of errors, and its library in Rust panics.
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reasons.append(str(error) or type(error).__name__)
    else:
        used = [name for name in (ALL_IN_ONE, WORDS, MERGES, SETTINGS) if name in files]
        raise damaged(f"transformers cannot read the tokenizer of {folder} ({some(used)}): {reasons[0]}")
    if tokenizer.vocab_size < 1:
        raise damaged(f"the tokenizer of {folder} has an empty vocabulary")
    return tokenizer


def with_vocab_limit(spec: ModelSpec, folder: Path) -> ModelSpec:
    """The spec with the number of ids up to the last that the tokenizer of the folder knows, if the model has more.

    Ids below that are taken to have text. The ends and the padding of the configuration stay below it. Raises
    ValueError if a file of the tokenizer is damaged.
    """
    known = list(_known_ids(folder))
    if not known:
        return spec
    limit = 1 + max(*known, spec.eos_token_id or 0, spec.pad_token_id or 0)
    return replace(spec, vocab_limit=limit) if limit < spec.vocab_size else spec


def _checked_files(folder: Path) -> dict[str, Any]:
    """What the folder has of a tokenizer, by file; refused if it is not complete."""
    files = {name: read_json(folder / name) for name in JSON if is_there(folder / name)}
    files |= {name: read_text(folder / name) for name in TEXT if is_there(folder / name)}
    found = {name for name in (ALL_IN_ONE, WORDS, MERGES) if name in files}
    advice = f"put its files, {ALL_IN_ONE} or {WORDS} and {MERGES}, beside the weights"
    if len(found) == 1 and ALL_IN_ONE not in found:
        lacks = next(name for name in (WORDS, MERGES) if name not in files)
        raise FileNotFoundError(f"{folder / lacks} is missing, without which {some(found)} means nothing: {advice}")
    others = [path.name for pattern in OTHER for path in folder.glob(pattern) if is_there(path)]
    if not found and not others:
        raise FileNotFoundError(f"{folder} has no tokenizer: {advice}")
    if ALL_IN_ONE not in found and WORDS in found:
        # Every token of several letters comes from a merge.
        merges = sum(bool(line) and not line.startswith("#version") for line in files[MERGES].splitlines())
        longer = sum(len(word) > 1 for word in files[WORDS])
        if 2 * merges < longer:
            raise damaged(f"{folder / MERGES} is cut short: {merges} merges do not make {longer} tokens")
    return files


def _classes(files: dict[str, Any]) -> list[Any]:
    """The classes of transformers to try. Its named classes would rebuild a `tokenizer.json` by rules of their own."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2TokenizerFast

    if ALL_IN_ONE in files:
        return [PreTrainedTokenizerFast]
    named = files.get(SETTINGS, {}).get("tokenizer_class")
    with contextlib.suppress(ValueError):  # a tokenizer may be of use without a model that is loaded
        if named in DREAMS and family_of(files.get(CONFIG, {})).name == "dream":
            return [AutoTokenizer, Qwen2TokenizerFast]
    return [AutoTokenizer]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers, which warns of every model type that it does not know, ours among them."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _known_ids(folder: Path) -> Iterator[int]:
    """The ids of the tokenizer in a folder; none if it has no vocabulary that can be read without its library."""
    vocabulary = [name for name in (ALL_IN_ONE, WORDS) if is_there(folder / name)][:1]
    for name in [*vocabulary, "added_tokens.json", SETTINGS] if vocabulary else []:
        if is_there(folder / name):
            for one in _ids(name, read_json(folder / name)):
                if type(one) is not int or one < 0:
                    raise damaged(f"{folder / name} has a token with the id {one!r}")
                yield one


def _ids(name: str, content: dict[str, Any]) -> Iterator[Any]:
    """The ids in a file of a tokenizer, whatever they are; of another form, none."""
    if name == ALL_IN_ONE:
        model, added = content.get("model"), content.get("added_tokens")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict):
            yield from vocabulary.values()
        elif isinstance(vocabulary, list):  # Unigram: the id of a token is its place
            yield from range(len(vocabulary))
        yield from (token.get("id") for token in added if isinstance(token, dict)) if isinstance(added, list) else ()
    elif name == SETTINGS:
        added = content.get("added_tokens_decoder")
        yield from (int(i) if i.isdecimal() else i for i in added) if isinstance(added, dict) else ()
    else:
        yield from content.values()
