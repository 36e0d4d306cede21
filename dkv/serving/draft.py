"""The whole canvas of an answer while it is written: kept on the thread of the model, told on the event loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from dkv.tools.streaming import draft_pieces
from dkv.tools.text import filling_text


@dataclass(frozen=True)
class Draft:
    """An answer as it stands after a step.

    Attributes:
        step: how many steps it has had.
        tokens: the new ones, the mask id where there is none yet.
        steps: of every new slot the step that wrote it last, from 1; 0: none did.
        computed: the slots that the step computed, prompt and answer, as runs [first, last + 1].
    """

    step: int
    tokens: Sequence[int]
    steps: Sequence[int]
    computed: Sequence[Sequence[int]]


class Watch:
    """Follows the canvas of one answer, step by step.

    Args:
        mask_id: id of a slot without a token.
    """

    def __init__(self, mask_id: int):
        self._mask_id = mask_id
        self._tokens: list[int] = []
        self._steps: list[int] = []

    def after(self, step: int, tokens: list[int], computed: Sequence[bool]) -> Draft:
        """What there is after a step, and what it computed."""
        before = self._tokens or [self._mask_id] * len(tokens)
        steps = self._steps or [0] * len(tokens)
        self._steps = [at if new == old else step for at, new, old in zip(steps, tokens, before, strict=True)]
        self._tokens = tokens
        return Draft(step, tokens, self._steps, runs(computed))


class Drafted:
    """Tells the drafts of one answer to a reader, who may miss some.

    Args:
        tokenizer, spec: of the model.
        prompt: tokens of the prompt.
    """

    def __init__(self, tokenizer: Any, spec: Any, prompt: int):
        self._tokenizer, self._spec, self._prompt = tokenizer, spec, prompt
        self._told: Sequence[int] = ()

    def take(self, draft: Draft, settled: int) -> dict[str, Any]:
        """A draft as plain values; of its slots those that changed since the last one that was taken.

        Args:
            settled: tokens from the first on that stay as they are.
        """
        tokens, mask_id = draft.tokens, self._spec.mask_token_id
        told = self._told or [mask_id] * len(tokens)
        self._told = tokens
        pieces = draft_pieces(self._tokenizer, self._spec, tokens, [False] * len(tokens))
        return {
            "step": draft.step,
            "draft": "".join(text for _, text in pieces),
            "settled": settled,
            "masked": sum(token == mask_id for token in tokens),
            "prompt": self._prompt,
            "slots": len(tokens),
            "filled": [
                [slot, draft.steps[slot], filling_text(self._tokenizer, [token], raw=True)]
                for slot, (token, before) in enumerate(zip(tokens, told, strict=True))
                if token != before
            ],
            "computed": draft.computed,
        }


def runs(held: Sequence[bool]) -> list[list[int]]:
    """Where it holds, as runs [first, last + 1]."""
    found, end = [], 0
    for value, run in groupby(held):
        begin, end = end, end + len(list(run))
        if value:
            found.append([begin, end])
    return found
