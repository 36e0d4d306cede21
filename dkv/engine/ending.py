"""Where a row ends before its last slot: at an end token, or where stopping criteria of transformers say so."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import MaxTimeCriteria, StoppingCriteriaList

from dkv.core.sequences import Sequences
from dkv.engine.config import DiffusionConfig

# As in transformers: (ids [n, length], scores) -> bool [n]
StoppingCriteria = Callable[[Tensor, Any], Any]


def id_list(ids: int | list[int] | None) -> list[int]:
    """An id, several or none, as a list."""
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def unwanted_ends(config: DiffusionConfig, spec: Any) -> tuple[list[int], list[int]]:
    """The ids that are never emitted (`logits_eos_inf`), and those that come last (`confidence_eos_eot_inf`).

    Args:
        spec: of the model, whose ids stand in for those that are not set.

    Raises:
        ValueError: they are needed, and there is none.
    """
    eos = id_list(spec.eos_token_id if config.eos_token_id is None else config.eos_token_id)
    eot = id_list(spec.eot_token_id if config.eot_token_id is None else config.eot_token_id)
    if (config.logits_eos_inf and not eos) or (config.confidence_eos_eot_inf and not eos + eot):
        name = "logits_eos_inf" if config.logits_eos_inf else "confidence_eos_eot_inf"
        raise ValueError(f"{name} needs an end token, and the model names none: give eos_token_id")
    return eos if config.logits_eos_inf else [], sorted({*eos, *eot}) if config.confidence_eos_eot_inf else []


def among(x: Tensor, ids: Tensor) -> Tensor:
    """bool, shape of x: whether each is one of `ids` [n]. `torch.isin` waits for a GPU where these are many."""
    return (x[..., None] == ids).any(-1)


class Ending:
    """Looks for the ends of rows after every step.

    A slot counts once no mask stands before it: a diffusion model may place an end token long before the
    text that leads up to it.

    Args:
        eos: end ids.
        criteria: of transformers. They see a row alone, without padding and up to its first mask, as if it
            had grown by one token at a time: the first length for which one of them holds is the end. They
            are also asked in steps that do not add to it, and get None for scores. As long as nothing is decoded
            right after the prompt, only `MaxTimeCriteria` is asked: the others judge new tokens.
        rows: of the batch.
    """

    def __init__(self, eos: Sequence[int], criteria: StoppingCriteriaList | None, rows: int, device: torch.device):
        self.criteria = criteria
        self.eos = torch.tensor(list(eos), dtype=torch.int64, device=device) if eos else None
        self._clocks = StoppingCriteriaList(c for c in criteria or () if isinstance(c, MaxTimeCriteria))
        self._asked = [-1] * rows

    @property
    def asked(self) -> bool:
        """Whether `ends` is asked after every step, in Python; else the step itself looks for `eos`."""
        return self.criteria is not None

    def ends(self, rows: Sequences, numbers: Sequence[int]) -> Tensor:
        """int64 [B, 1]: the length of a row if it ends now, else more than it has.

        Criteria are Python, and read the rows. Only those with `numbers` are looked at.
        """
        never = rows.size + 1
        found = torch.full_like(rows.lengths, never)
        known = rows.masked.cumsum(1) == 0
        if self.eos is not None:
            end = among(rows.tokens[:, :-1], self.eos) & known & (rows.rank >= 0)
            length = torch.arange(1, never, device=known.device)
            found = torch.where(end, length, never).amin(1, keepdim=True)
        lengths = (known & rows.everywhere).sum(1).tolist()
        # Of the slots before the first one to fill.
        prompts, texts = ((rows.rank < 0).cumprod(1)).sum(1).tolist(), rows.texts()
        asked = [-1] * len(texts)
        for row in numbers:
            asked[row] = self._asked_for(row, texts[row], prompts[row], lengths[row], never)
        asked = torch.tensor(asked, device=found.device)[:, None]
        return torch.where(asked < 0, never, torch.minimum(found, asked))

    def _asked_for(self, row: int, text: Tensor, prompt: int, length: int, never: int) -> int:
        """The first length, of those not asked for yet, that the criteria stop at."""
        criteria, first = (self.criteria, self._asked[row] + 1) if length > prompt else (self._clocks, length)
        first = min(max(first, prompt + 1), length)
        self._asked[row] = length
        for end in range(first, length + 1):
            if criteria and bool(criteria(text[None, :end], None).all()):
                return end
        return never
