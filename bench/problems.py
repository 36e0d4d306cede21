"""Problems with one right answer each, and a model that answers them."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import dkv
from dkv.models.bundled.tasks import TASKS, held_out
from dkv.tools.text import answer, encode

# Problems that are answered at a time, where nothing else is asked for.
BATCH = 8


@dataclass(frozen=True)
class Problems:
    """A family of problems: prompts, their right answers, and the slots that an answer gets."""

    name: str
    prompts: Sequence[str]
    answers: Sequence[str]
    new: int


def bundled(names: Iterable[str], count: int, **seed: int) -> list[Problems]:
    """`count` unseen problems of each of the bundled models' tasks; with `seed=`, others."""
    found = []
    for name in names:
        prompts, answers = zip(*held_out(count, task=name, **seed), strict=True)
        found.append(Problems(name, prompts, answers, TASKS[name].new_tokens))
    return found


def from_file(path: Path, new: int, count: int | None = None) -> list[Problems]:
    """The problems of a JSON Lines file: objects with prompt and answer, and a task where there are several.

    Args:
        new: slots of every answer.
        count: at most so many per task; None: all.

    Raises:
        ValueError: a line is not such an object, or there is none; the message has its number.
    """
    tasks: dict[str, list[tuple[str, str]]] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error})") from error
        texts = [row.get(key) for key in ("prompt", "answer")] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f'{path} line {number} must be an object with texts "prompt" and "answer", got {line:.50}')
        tasks.setdefault(str(row.get("task", path.stem)), []).append(tuple(texts))
    if not tasks:
        raise ValueError(f"{path} holds no problems: one JSON object per line, with prompt and answer")
    return [Problems(name, *zip(*rows[:count], strict=True), new) for name, rows in tasks.items()]


@dataclass(frozen=True)
class Exam:
    """A model before a family of problems.

    Attributes:
        chat: put the prompts into the tokenizer's chat template.
    """

    model: Any
    tokenizer: Any
    problems: Problems
    chat: bool = False

    def encoded(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 [B, P], of the prompts from `start` to `stop`."""
        ids, mask = encode(self.tokenizer, self.problems.prompts[start:stop], self.chat)
        return ids.to(self.model.device), mask.to(self.model.device)

    def decode(self, start: int, stop: int, **settings: Any) -> tuple[Any, list[str]]:
        """The output of `dkv.generate` for these problems, and its answers as texts."""
        ids, mask = self.encoded(start, stop)
        output = dkv.generate(self.model, ids, mask, **{"max_new_tokens": self.problems.new, **settings})
        rows = output.sequences[:, ids.shape[1] :].tolist()
        return output, [answer(self.tokenizer, self.model.spec, row).strip() for row in rows]

    def marks(self, start: int, stop: int, **settings: Any) -> tuple[Any, list[bool]]:
        """The output, and which of its answers are right in every character."""
        output, texts = self.decode(start, stop, **settings)
        right = self.problems.answers[start:stop]
        return output, [text == one.strip() for text, one in zip(texts, right, strict=True)]

    def sit(self, **settings: Any) -> Iterator[tuple[Any, list[bool]]]:
        """The `marks` of all problems, `BATCH` at a time."""
        for start in range(0, len(self.problems.answers), BATCH):
            yield self.marks(start, start + BATCH, **settings)


def fingerprint(problems: Sequence[Problems]) -> str:
    """Of all texts and canvases."""
    text = json.dumps([[family.name, family.new, *family.prompts, *family.answers] for family in problems])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
