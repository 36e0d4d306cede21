"""Texts with gaps: what a client may ask of `/v1/infill`, and the text of what was filled."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dkv.engine.generate import infill_config
from dkv.serving.protocol import COMMON, Asked, Served, check_count, check_names, configs_of, flag_of, whole_of
from dkv.serving.replies import Refusal
from dkv.tools.gaps import Gap
from dkv.tools.marked import MARKER, Marked, marked
from dkv.tools.text import filling_text, mask_text

LONGEST_MARKER = 64
# Of what is told in pieces, which a text with gaps is not.
WHOLE = ("stream", "draft")


@dataclass(frozen=True)
class AskedGaps(Asked):
    """Texts whose gaps are to be filled, checked.

    Attributes:
        texts: by prompt, what stands around its gaps.
        places: by prompt, where the tokens of each gap stand, first and last + 1.
    """

    texts: list[Marked] = field(default_factory=list)
    places: list[list[tuple[int, int]]] = field(default_factory=list)

    @property
    def how(self) -> dict[str, bool]:
        return {"infill": True}

    @property
    def read(self) -> int:
        gaps = sum(end - begin for places in self.places for begin, end in places)
        return super().read - gaps

    def written(self, served: Served) -> list["Filled"]:
        n = len(self.configs) // len(self.prompts)
        both = zip(self.texts, self.places, strict=True)
        return [Filled(served.tokenizer, text, places) for text, places in both for _ in range(n)]


class Filled:
    """Makes the text of a canvas whose masks were filled; used as `Written` is.

    Args:
        tokenizer: of the model.
        text: what stands around the gaps.
        places: of the tokens of each gap.
    """

    def __init__(self, tokenizer: Any, text: Marked, places: Sequence[tuple[int, int]]):
        self._tokenizer, self._around, self._places = tokenizer, text, places
        self.text, self.tokens = "", 0
        self.more: dict[str, Any] = {}
        self.logprobs: list[tuple[str, float]] | None = None
        self.finish: str | None = None

    def take(self, ids: Sequence[int], last: bool) -> str:
        """What is new in the text: all of it, when there are no more `ids`, those of the canvas."""
        if last:
            gaps = [filling_text(self._tokenizer, ids[begin:end]) for begin, end in self._places]
            self.text, self.more, self.finish = self._around.joined(gaps), {"gaps": gaps}, "stop"
            self.tokens = sum(end - begin for begin, end in self._places)
        return self.text


def asked_gaps(fields: dict[str, Any], served: Served) -> AskedGaps:
    """Check what is asked.

    Args:
        fields: of `fields_of`.

    Raises:
        Refusal: of the first fault that is found.
    """
    check_names(fields, (*COMMON, "prompt", "marker", *WHOLE), served)
    for name in WHOLE:
        if flag_of(fields, name):
            raise Refusal(400, f"{name} does not go with gaps, which are told when all are filled", name)
    n, prompt = whole_of(fields, "n", 1, served.max_choices), fields.get("prompt")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not prompts or not all(isinstance(one, str) for one in prompts):
        raise Refusal(400, "prompt must be a text with gaps, or a list of these", "prompt")
    check_count(len(prompts), n, served)
    marker = fields.get("marker", MARKER)
    if not isinstance(marker, str) or not 0 < len(marker) <= LONGEST_MARKER:
        raise Refusal(400, f"marker must be a text of 1 to {LONGEST_MARKER} characters", "marker")
    texts = [_marked(one, marker, served) for one in prompts]
    ids, places = zip(*(_canvas(text, served) for text in texts), strict=True)
    configs = configs_of(fields, served, len(prompts) * n, infill_config)
    return AskedGaps([*ids], configs, texts=texts, places=[*places])


def _marked(prompt: str, marker: str, served: Served) -> Marked:
    """A text cut at its gaps."""
    try:
        text = marked(prompt, marker, mask_text(served.tokenizer, served.spec))
    except ValueError as error:
        raise Refusal(400, str(error).replace("--marker", "marker"), "prompt") from None
    if not text.gaps:
        raise Refusal(400, f"prompt has no gap: there is no {marker} in it", "prompt")
    # Before they are written out as so many masks, and the pieces between them made tokens.
    _check_length(sum(gap.most for gap in text.gaps), served)
    return text


def _canvas(text: Marked, served: Served) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a text with masks in its gaps, and where these stand."""
    try:
        parts = text.tokens(served.tokenizer)
    except ValueError as error:
        raise Refusal(400, str(error), "prompt") from None
    ids: list[int] = []
    places: list[tuple[int, int]] = []
    for part in parts:
        if isinstance(part, Gap):
            places.append((len(ids), len(ids) + part.most))
            ids += [served.spec.mask_token_id] * part.most
        else:
            ids.append(part)
    _check_length(len(ids), served)
    return ids, places


def _check_length(count: int, served: Served) -> None:
    if count > served.max_length:
        said = f"a text of {count} tokens with its gaps is longer than the {served.max_length} that this server takes"
        raise Refusal(400, said, "prompt", "context_length_exceeded")
