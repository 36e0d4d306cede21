"""The text of an answer as it grows, up to its end or a stop string."""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import Any

from dkv.tools.trace.record import texts_of

# What a decoder writes for bytes that are no whole character, or not yet.
BROKEN = "\ufffd"


class Written:
    """Makes text that is never taken back of the tokens that stand before the first mask of an answer.

    A stop string ends the text in front of it. Of several the one counts that is complete first, however many tokens
    come at a time: the text is the same, whether it is watched or not.

    Args:
        tokenizer: of the model.
        ends: ids that end a text.
        stops: strings that do.

    Attributes:
        text: so far.
        tokens: of which the text was made, with those of a stop string.
        finish: "stop" at an end or a stop string, "length" without; None: there is more to come.
        more: fields of the answer beside its text.
        logprobs: of each of these tokens its text, and how likely it was; None: not asked for.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int], stops: Sequence[str] = ()):
        self._tokenizer, self._ends, self._stops = tokenizer, frozenset(ends), tuple(stops)
        self.text, self.tokens = "", 0
        self.more: dict[str, Any] = {}
        self.logprobs: list[tuple[str, float]] | None = None
        self.finish: str | None = None

    def take(self, ids: Sequence[int], last: bool) -> str:
        """What is new in the text.

        Args:
            ids: all new tokens so far; before the last time, those before the first mask.
            last: there are no more.
        """
        count = next((number for number, token in enumerate(ids) if token in self._ends), len(ids))
        ended = count < len(ids)
        whole = self._decode(ids[:count])
        if not (last or ended):
            whole = whole.rstrip(BROKEN)
        stop = _first_stop(whole, self._stops)
        if stop is not None:
            begin, end = stop
            self.finish, text = "stop", whole[:begin]
            count = bisect_left(range(count), end, key=lambda number: len(self._decode(ids[:number])))
        elif last or ended:
            self.finish, text = "stop" if ended else "length", whole
        else:
            text = whole[: len(whole) - _begun(whole, self._stops)]
        new, self.text, self.tokens = text[len(self.text) :], text, count
        return new

    def note_logprobs(self, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Keep how likely the tokens of the text were, of all new tokens."""
        texts, length = texts_of(self._tokenizer, ids[: self.tokens]), 0
        self.logprobs = []
        for text, logprob in zip(texts, logprobs, strict=False):
            # Those of a stop string stand behind the text.
            if length >= len(self.text):
                break
            self.logprobs.append((text, logprob))
            length += len(text)

    def _decode(self, ids: Sequence[int]) -> str:
        # Tidied spaces would change what stands already.
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """Where the stop string begins and ends that is complete first; of two the longer one."""
    found = [(begin + len(stop), begin) for stop in stops if (begin := text.find(stop)) >= 0]
    if not found:
        return None
    end, begin = min(found)
    return begin, end


def _begun(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the begin of a stop string."""
    lengths = (length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
    return max(lengths, default=0)
