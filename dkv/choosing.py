"""From hidden states to a token and its confidence, without keeping logits."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dkv import kernels
from dkv.config import DiffusionConfig

LOGITS_AT_A_TIME = 1 << 24
# As in transformers: (ids [n, length], scores [n, V]) -> scores
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


class Chooser:
    """Chooses a token for every hidden state, by the rules of a configuration.

    Args:
        model: its `head` gives the logits.
        config: temperature, filters, confidence.
        mask_id: never chosen.
        workspace: scratch to use again between calls.
        processor: changes the logits before anything else looks at them; they are then computed row by row.
    """

    def __init__(
        self, model: Any, config: DiffusionConfig, mask_id: int, workspace: kernels.Workspace,
        processor: LogitsProcessor | None = None,
    ):  # fmt: skip
        self.model, self.workspace, self.processor = model, workspace, processor
        self.exact = not config.savings.tail_confidence
        drawn = config.temperature > 0
        self.how = {
            "rule": "probability" if config.confidence == "random" else config.confidence,
            "temperature": config.temperature,
            # Dream takes filters and confidences from the tempered logits, LLaDA from the raw ones.
            "confidence_temperature": config.temperature if drawn and model.spec.shifted else 1.0,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "seed": 0,
            "banned": (mask_id,),
            "vocab_limit": model.spec.vocab_limit if config.vocab_limit is None else config.vocab_limit,
            "validate": False,
        }

    def __call__(
        self, hidden: Tensor, keys: Tensor | None, counts: Sequence[int], texts: Callable[[], Sequence[Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Tokens and log-confidences, [T] each.

        Args:
            hidden: [T, d], the rows of the batch one after the other.
            keys: [T, K] of the noise; None where tokens are not drawn.
            counts: how many of the T are of each row.
            texts: gives the ids of every row, [length] each, for the processor.
        """
        head, how = self.model.head, {**self.how, "row_keys": keys}
        if self.processor is not None:
            return self._processed(hidden, keys, counts, texts())
        if self.exact:
            with kernels.use_backend("reference"):
                return kernels.choose_token(head(hidden).double(), **how)
        if type(head) is nn.Linear:
            return kernels.choose_token_fused(hidden, head.weight, head_bias=head.bias, workspace=self.workspace, **how)
        if hasattr(head, "strips"):
            return kernels.choose_token_fused(hidden, head, workspace=self.workspace, **how)
        rows = max(1, LOGITS_AT_A_TIME // self.model.spec.vocab_size)
        parts = hidden.split(rows)
        return self._parts(map(head, parts), [None] * len(parts) if keys is None else keys.split(rows))

    def _processed(
        self, hidden: Tensor, keys: Tensor | None, counts: Sequence[int], texts: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """With the processor: of one row at a time, so that no row can tell what is beside it."""
        counts = list(counts)
        logits = (
            self._changed(text.expand(len(part), -1), self.model.head(part).float())
            for text, part in zip(texts, hidden.split(counts), strict=True)
            if len(part)
        )
        some = [None] * len(counts) if keys is None else keys.split(counts)
        return self._parts(logits, [part for part, count in zip(some, counts, strict=True) if count])

    def _changed(self, ids: Tensor, scores: Tensor) -> Tensor:
        found = self.processor(ids, scores)
        if not isinstance(found, Tensor) or found.shape != scores.shape:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"logits_processor must return scores {list(scores.shape)}, got {got}")
        return found

    def _parts(self, logits: Any, keys: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """`choose_token` of several parts, whose logits may be overwritten."""
        how = {**self.how, "overwrite": True, "workspace": self.workspace}
        found = [kernels.choose_token(part, row_keys=key, **how) for part, key in zip(logits, keys, strict=True)]
        token, confidence = zip(*found, strict=True)
        return torch.cat(token), torch.cat(confidence)
