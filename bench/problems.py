"""What a model is examined on: problems with one right answer each, or openings of texts that it goes on with."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import dkv
from dkv.models.bundled import passages
from dkv.models.bundled.tasks import ALL_TASKS, held_out
from dkv.tools.likelihood import log_likelihoods
from dkv.tools.text import answer, encode

# Problems that are answered at a time, where nothing else is asked for.
BATCH = 8
# Of each bundled task, where no number is given. Of a passage plain decoding takes a CPU some seconds.
PROBLEMS, PASSAGES = 96, 8
# Masked copies of a text that tell how likely it is, and tokens of a run that counts as repeated.
COPIES, RUN = 16, 12
# An output of dkv, and numbers of each kind for every row, or several of a row.
Marked = tuple[Any, dict[str, list[Any]]]


@dataclass(frozen=True)
class Problems:
    """A family of problems: prompts, their right answers, and the slots that an answer gets."""

    name: str
    prompts: Sequence[str]
    answers: Sequence[str]
    new: int

    def marked(self, exam: "Exam", start: int, stop: int, **settings: Any) -> Marked:
        """The output for these problems, and under "right" which of its answers are."""
        output, right = exam.marks(start, stop, **settings)
        return output, {"right": right}


@dataclass(frozen=True)
class Openings:
    """Texts to go on with. No answer is right: what is written is judged by the model itself.

    Under "nats" the model's own estimate of how unlikely it is, a token (`dkv.tools.likelihood`); under "repeated" the
    share of its tokens that end a run of `RUN` tokens which stands in it before. Likelihood alone would praise a text
    that says the same again and again.
    """

    name: str
    prompts: Sequence[str]
    new: int

    def marked(self, exam: "Exam", start: int, stop: int, **settings: Any) -> Marked:
        ids, mask = exam.encoded(start, stop)
        output = dkv.generate(exam.model, ids, mask, **{"max_new_tokens": self.new, **settings})
        written = output.sequences[:, ids.shape[1] :].tolist()
        prompts = [row[real].tolist() for row, real in zip(ids, mask.bool(), strict=True)]
        questions = list(zip(prompts, written, strict=True))
        found = dict(log_likelihoods(exam.model, questions, samples=COPIES, batch_size=COPIES))
        nats = [-found[row] / max(len(text), 1) for row, text in enumerate(written)]
        return output, {"nats": nats, "repeated": list(map(repeated, written))}


def repeated(tokens: Sequence[int]) -> float:
    """The share of tokens that end a run of `RUN` tokens which has been there before."""
    runs = [tuple(tokens[i : i + RUN]) for i in range(len(tokens) - RUN + 1)]
    return (len(runs) - len(set(runs))) / max(len(runs), 1)


@dataclass(frozen=True)
class Gapped:
    """Texts with holes, which are to be filled as they were. Under "right" for every hole whether it was.

    Attributes:
        prompts: the whole texts.
        holes: by text, (first token, the one after the last) of each.
        new: slots to fill in a text, at most.
    """

    name: str
    prompts: Sequence[str]
    holes: Sequence[Sequence[tuple[int, int]]]
    new: int

    def marked(self, exam: "Exam", start: int, stop: int, **settings: Any) -> Marked:
        ids, mask = exam.encoded(start, stop)
        texts, holes = ids.clone(), self.holes[start:stop]
        for row, own in zip(texts, holes, strict=True):
            for first, end in own:
                row[first:end] = exam.model.spec.mask_token_id
        settings.pop("max_new_tokens", None)
        output = dkv.infill(exam.model, texts, mask, **settings)
        same = output.sequences == ids
        return output, {"right": [bool(same[row, a:b].all()) for row, own in enumerate(holes) for a, b in own]}


Family = Problems | Openings | Gapped


def bundled(names: Iterable[str], count: int | None = None, seed: int | None = None) -> list[Family]:
    """`count` unseen problems, or passages, of each of the bundled models' tasks; with a seed, others.

    None: `PROBLEMS`, or `PASSAGES`.
    """
    drawn = {} if seed is None else {"seed": seed}
    return [
        TEXTS[name](count or PASSAGES, **drawn) if name in TEXTS else _problems(name, count or PROBLEMS, **drawn)
        for name in names
    ]


def _problems(name: str, count: int, **seed: int) -> Problems:
    prompts, answers = zip(*held_out(count, task=name, **seed), strict=True)
    return Problems(name, prompts, answers, ALL_TASKS[name].new_tokens)


def _stories(count: int, seed: int = 0) -> Openings:
    return Openings("stories", passages.openings(count, seed), passages.NEW)


def _words(count: int, seed: int = 0) -> Gapped:
    texts, holes = zip(*passages.with_holes(count, seed), strict=True)
    return Gapped("words", texts, holes, max(sum(end - first for first, end in own) for own in holes))


# The tasks of `tiny-text`.
TEXTS = {"stories": _stories, "words": _words}


def from_file(path: Path, new: int, count: int | None = None) -> list[Problems | Openings]:
    """The problems of a JSON Lines file: objects with prompt and answer, and a task where there are several.

    A task without answers is one of texts to go on with.

    Args:
        new: slots of every answer.
        count: at most so many per task; None: all.

    Raises:
        ValueError: a line is not such an object, or there is none, or a task has answers to some of its prompts alone;
            the message has its number.
    """
    tasks: dict[str, list[tuple[str, str | None]]] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error})") from error
        texts = [row[key] for key in ("prompt", "answer") if key in row] if isinstance(row, dict) else []
        if not texts or "prompt" not in row or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f'{path} line {number} must be an object with texts "prompt" and "answer", got {line:.50}')
        own = tasks.setdefault(str(row.get("task", path.stem)), [])
        if own and len(own[0]) != len(texts):
            raise ValueError(f"{path} line {number}: a task has an answer to every prompt, or to none")
        own.append(tuple(texts))
    if not tasks:
        raise ValueError(f"{path} holds no problems: one JSON object per line, with prompt and answer")
    families = {name: tuple(zip(*rows[:count], strict=True)) for name, rows in tasks.items()}
    return [(Problems if len(texts) == 2 else Openings)(name, *texts, new) for name, texts in families.items()]


@dataclass(frozen=True)
class Exam:
    """A model before a family of problems.

    Attributes:
        chat: put the prompts into the tokenizer's chat template.
    """

    model: Any
    tokenizer: Any
    problems: Family
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


def fingerprint(problems: Sequence[Family]) -> str:
    """Of all texts and canvases."""
    wanted = [(*getattr(family, "answers", ()), *getattr(family, "holes", ())) for family in problems]
    every = [[x.name, x.new, *x.prompts, *own] for x, own in zip(problems, wanted, strict=True)]
    return hashlib.blake2b(json.dumps(every).encode(), digest_size=8).hexdigest()
