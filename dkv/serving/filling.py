"""Requests that are all there at once, or come in a stream, and keep the rows of an `LLM` full."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dkv.serving.llm import LLM
from dkv.serving.request import FAILED, Request

END = object()


@dataclass(frozen=True)
class Asked:
    """What is asked: by which number it is known, the ids of its prompt, and its settings."""

    number: int
    ids: Sequence[int]
    settings: Mapping[str, Any] = field(default_factory=dict)


def answered(llm: LLM, asked: Iterable[Asked | None]) -> Iterator[tuple[int, Request | Exception]]:
    """Keep all rows busy, and give every request when it has ended, with the number of what was asked.

    Args:
        llm: that nobody else uses meanwhile.
        asked: is taken from when a row is free; None: there is nothing more just now.

    Returns:
        Numbers, and requests that are finished; or why one cannot be, or has logits that are no numbers.

    Raises:
        Exception: of the device, such as one without memory: it is none of a request's.
    """
    asked, going, more = iter(asked), {}, True
    while more or going:
        while more and llm.running + llm.waiting < llm.rows:
            one = next(asked, END)
            more = one is not END
            if one in (None, END):
                break
            try:
                going[llm.add(one.ids, **one.settings)] = one.number
            except (TypeError, ValueError, IndexError) as error:
                yield one.number, error
        for request in llm.step() if going else ():
            number = going.pop(request)
            if request.state == FAILED and not isinstance(request.error, TypeError | ValueError | IndexError):
                raise request.error
            yield number, request.error or request
