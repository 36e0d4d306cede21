"""The lines of a data set: a prompt or a talk each, with an id; and what is wrong with those that are none."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dkv.common.process import in_one_line
from dkv.engine.published_names import own_name
from dkv.engine.settings import BY_ROW, DEFAULTS, check_value
from dkv.tools.text import ids_of, talk_text

Id = str | int
# A row as it was read, or why it could not be.
Found = tuple[int, Any]


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        number: in its file, from 1.
        id: None: it has none that can be told.
        content: a text, token ids, or messages with role and content.
        own: settings of its own, of `BY_ROW`.
        error: why it cannot be asked; None: it can, as far as is known without a model.
    """

    number: int
    id: Id | None
    content: str | list[Any] = ""
    own: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    def encoded(self, tokenizer: Any, chat: bool = False) -> list[int]:
        """Its token ids.

        Args:
            tokenizer: of the model; None: lines must be token ids.
            chat: a text is the message of a user.

        Raises:
            ValueError: there is no token for a character, or no chat template.
        """
        content = self.content
        if isinstance(content, list) and content and isinstance(content[0], int):
            return content
        if tokenizer is None:
            raise ValueError("a text needs a tokenizer: give tokenizer=, or token ids as prompt")
        if isinstance(content, str) and not chat:
            return ids_of(tokenizer, content, add_special_tokens=True)
        talk = [{"role": "user", "content": content}] if isinstance(content, str) else content
        # A template writes the special tokens itself.
        return ids_of(tokenizer, talk_text(tokenizer, talk), add_special_tokens=False)


@dataclass(frozen=True)
class DataSet:
    """All lines that are not blank, and a fingerprint of them."""

    lines: list[Line]
    digest: str


def from_file(path: Path) -> DataSet:
    """The lines of a file of JSON Lines.

    Raises:
        ValueError: there is none.
        OSError: it cannot be read.
    """
    digest, found = hashlib.blake2b(digest_size=8), []
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            text = raw.strip()
            digest.update(text + b"\n")
            if text:
                found.append((number, _parsed(text)))
    if not found:
        raise ValueError(f'{path} is empty: give a JSON object a line, such as {{"id": "a", "prompt": "1+2="}}')
    return DataSet(list(_checked(found)), digest.hexdigest())


def from_rows(rows: Iterable[Mapping[str, Any] | str]) -> DataSet:
    """The same of rows in memory: objects as in a file, or texts, which are prompts."""
    found = [(number, {"prompt": row} if isinstance(row, str) else row) for number, row in enumerate(rows, 1)]
    digest = hashlib.blake2b(digest_size=8)
    for _, row in found:
        digest.update(json.dumps(row, default=repr).encode() + b"\n")
    return DataSet(list(_checked(found)), digest.hexdigest())


def _parsed(text: bytes) -> Any:
    """What a line of JSON holds, or the error that it is."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return ValueError(f"it is not UTF-8 (byte {error.start})")
    except (ValueError, RecursionError) as error:
        return ValueError(f"it is not JSON ({error})")


def _checked(found: list[Found]) -> Iterator[Line]:
    """Lines with their ids; where no line has one, their numbers stand in."""
    named = any(isinstance(row, Mapping) and "id" in row for _, row in found)
    seen: dict[Id, int] = {}
    for number, row in found:
        line_id = None if named else number
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, Mapping):
                raise ValueError(f"it must be an object, got {json.dumps(row, default=repr):.50}")
            if named:
                line_id = _id(row)
                if line_id in seen:
                    raise ValueError(f"the id {line_id!r} is that of line {seen[line_id]}, too")
                seen[line_id] = number
            yield Line(number, line_id, _content(row), _own(row))
        except ValueError as error:
            yield Line(number, line_id, error=in_one_line(error))


def _id(row: Mapping[str, Any]) -> Id:
    if "id" not in row:
        raise ValueError("it has no id, and others have: give all lines one, or none")
    value = row["id"]
    if isinstance(value, str) and value:
        return _text("id", value)
    if type(value) is not int:
        raise ValueError(f"id must be a text or a whole number, got {json.dumps(value, default=repr):.50}")
    return value


def _content(row: Mapping[str, Any]) -> str | list[Any]:
    """Prompt or messages."""
    given = [name for name in ("prompt", "messages") if row.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"it must have prompt or messages, and has {'both' if given else 'neither'}")
    name, value = given[0], row[given[0]]
    if name == "messages":
        if not isinstance(value, list) or not value:
            raise ValueError("messages must be a list of objects with role and content")
        return [_message(message, number) for number, message in enumerate(value)]
    if isinstance(value, list) and value and all(type(one) is int for one in value):
        return value
    return _text("prompt", value, ", or a list of token ids")


def _message(message: Any, number: int) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise ValueError(f"messages[{number}] must be an object with role and content")
    return {name: _text(f"messages[{number}].{name}", message.get(name)) for name in ("role", "content")}


def _own(row: Mapping[str, Any]) -> dict[str, int]:
    """The settings of a line. A setting that is not a line's is no field of a data set by chance."""
    for name in row:
        if name not in BY_ROW and own_name(name) in DEFAULTS:
            may = ", ".join(BY_ROW)
            raise ValueError(f"{name} is a setting of all lines, and one may have {may}: remove or rename the field")
    own = {name: row[name] for name in BY_ROW if row.get(name) is not None}
    for name, value in own.items():
        if isinstance(value, list):
            raise ValueError(f"{name} must be one whole number, got {value!r:.50}")
        check_value(name, value)
    return own


def _text(name: str, value: Any, otherwise: str = "") -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text{otherwise}, got {json.dumps(value, default=repr):.50}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is no text: it has half of a surrogate pair") from None
    return value
