"""From hidden states to a token and its confidence, without keeping logits."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkv import kernels
from dkv.engine.config import DiffusionConfig
from dkv.engine.ending import among, unwanted_ends
from dkv.models.weight_only import WeightOnlyLinear

LOGITS_AT_A_TIME = 1 << 24
# As in transformers: (ids [n, length], scores [n, V]) -> scores
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


class Sampler:
    """Chooses a token for every hidden state, by the rules of a configuration.

    Args:
        model: its `head` gives the logits.
        config: temperature, filters, confidence, and what becomes of end tokens.
        mask_id: never chosen.
        workspace: scratch to use again between calls.
        processor: changes the logits before anything else looks at them; they are then computed row by row.
        entropy: whether to give the entropies of the distributions that the confidences are of.
    """

    def __init__(
        self,
        model: Any,
        config: DiffusionConfig,
        mask_id: int,
        workspace: kernels.Workspace,
        processor: LogitsProcessor | None = None,
        entropy: bool = False,
    ):
        self.model, self.workspace, self.processor = model, workspace, processor
        self.cfg_scale = config.cfg_scale
        self.rounded = config.confidence_dtype == "model"
        self.never, self.late = unwanted_ends(config, model.spec)
        # What is made once, as to make it in a step would make the host wait for the device: by ids, a tensor of them,
        # and how the head is handed on with their logits at -inf.
        self.made: dict[tuple[str, tuple[int, ...]], Any] = {}
        drawn = config.temperature > 0
        self.how = {
            "rule": "probability" if config.is_ordered else config.confidence,
            "temperature": config.temperature,
            # Dream takes filters and confidences from the tempered logits, LLaDA from the raw ones.
            "confidence_temperature": config.temperature if drawn and model.spec.shifted else 1.0,
            "confidence_dtype": config.confidence_dtype,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "banned": (mask_id,),
            "vocab_limit": model.spec.vocab_limit if config.vocab_limit is None else config.vocab_limit,
            "entropy": entropy,
            "validate": False,
        }

    def __call__(
        self,
        hidden: Tensor,
        keys: Tensor | None,
        counts: Callable[[], Sequence[int]],
        texts: Callable[[], Sequence[Tensor]],
    ) -> tuple[Tensor, ...]:
        """Tokens, log-confidences and, where asked for, entropies in nats: [R] each.

        Args:
            hidden: [R, d], the rows of the batch one after the other, filled up at the end.
            keys: [R, K] of the noise; None where tokens are not drawn.
            counts, texts: give for the processor how many of the R are of each row, and the ids of each, [length].
        """
        head = self.model.head
        if self.processor is not None:
            return self._processed(hidden, keys, counts(), texts())
        if _is_product(head) or hasattr(head, "strips"):
            how = {**self.how, "row_keys": keys, "workspace": self.workspace}
            return self._with_late_ends(lambda gone: kernels.choose_token_fused(hidden, **self._head(gone), **how))
        rows = max(1, LOGITS_AT_A_TIME // self.model.spec.vocab_size)
        parts = hidden.split(rows)
        return self._parts(map(head, parts), [None] * len(parts) if keys is None else keys.split(rows))

    def suspects(self) -> str:
        """What to say of logits that are no numbers."""
        found = ["the weights, and the dtype (float16 overflows where bfloat16 and float32 do not)"]
        if self.processor is not None:
            found.insert(0, "the logits_processor, which changes them")
        if self.cfg_scale:
            found.insert(0, f"cfg_scale={self.cfg_scale}, which multiplies them")
        return f"the model's logits hold NaN or infinity, or no id that may be chosen: check {', then '.join(found)}"

    def _with_late_ends(self, choose: Callable[[Sequence[int]], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The choice that `choose` makes with the logits of some ids gone, that is at -inf.

        With `confidence_eos_eot_inf` the token is chosen first. How sure it is, is then asked as if there were no
        end tokens (published code of LLaDA), and where the token is one of them, the answer is -inf: less than all
        others, which are finite. The entropy is that without end tokens, 0 where nothing else is possible.
        """
        token, confidence, *entropy = choose(self.never)
        if not self.late:
            return token, confidence, *entropy
        _, without, *entropy = choose(self.never + self.late)
        entropy = [x.masked_fill(without.isnan(), 0) for x in entropy]
        without = without.clamp(min=torch.finfo(without.dtype).min)
        without = without.masked_fill(among(token, self._tensor(self.late)), -torch.inf)
        return token, *(x.masked_fill(confidence.isnan(), torch.nan) for x in (without, *entropy))

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        key = "ids", tuple(ids)
        if key not in self.made:
            self.made[key] = torch.tensor(key[1], device=self.model.device)
        return self.made[key]

    def _head(self, gone: Sequence[int]) -> dict[str, Any]:
        """The head with the logits of some ids at -inf, as `choose_token_fused` takes it."""
        key = "head", tuple(gone)
        if key not in self.made:
            self.made[key] = _without(self.model.head, gone, self.model.dtype)
        return self.made[key]

    def _of_logits(self, logits: Tensor, keys: Tensor | None) -> tuple[Tensor, ...]:
        """The choice from logits, which may be overwritten."""

        def choose(gone: Sequence[int]) -> tuple[Tensor, ...]:
            if gone:
                logits.index_fill_(1, self._tensor(gone), -torch.inf)
            last = len(gone) == len(self.never) + len(self.late)
            return kernels.choose_token(logits, row_keys=keys, overwrite=last, workspace=self.workspace, **self.how)

        return self._with_late_ends(choose)

    def _processed(
        self, hidden: Tensor, keys: Tensor | None, counts: Sequence[int], texts: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """With the processor: of one row at a time, so that no row can tell what is beside it."""
        # What fills the entries up belongs to no row.
        counts, total = [*counts], sum(counts)
        logits = (
            self._changed(text.expand(len(part), -1), self.model.head(part))
            for text, part in zip(texts, hidden[:total].split(counts), strict=True)
            if len(part)
        )
        some = [None] * len(counts) if keys is None else keys[:total].split(counts)
        found = self._parts(logits, [part for part, count in zip(some, counts, strict=True) if count])
        return tuple(F.pad(x, (0, len(hidden) - total)) for x in found)

    def _changed(self, ids: Tensor, logits: Tensor) -> Tensor:
        scores = logits.float()
        found = self.processor(ids, scores)
        if not isinstance(found, Tensor) or found.shape != scores.shape:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"logits_processor must return scores {list(scores.shape)}, got {got}")
        return found.to(logits.dtype) if self.rounded else found

    def _parts(self, logits: Any, keys: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The choices from several parts of logits."""
        found = [self._of_logits(part, key) for part, key in zip(logits, keys, strict=True)]
        return tuple(map(torch.cat, zip(*found, strict=True)))


def _is_product(head: Any) -> bool:
    """Whether the logits are a product with the very weight of the layer; one that is quantised otherwise (torchao) is
    multiplied by its layer alone.
    """
    plain = type(head) is nn.Linear and type(head.weight) in (Tensor, nn.Parameter)
    return plain or isinstance(head, WeightOnlyLinear)


def _without(head: Any, gone: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """A head with the logits of some ids at -inf, as `choose_token_fused` takes it; they are of this dtype."""
    if not _is_product(head):
        return {"head_weight": _Strips(head, gone) if gone else head}
    bias = head.bias
    if gone:
        bias = torch.zeros(len(head.weight), dtype=dtype, device=head.weight.device) if bias is None else bias.clone()
        bias[gone] = -torch.inf
    return {"head_weight": head.weight, "head_bias": bias, "head_scales": getattr(head, "scales", None)}


class _Strips:
    """A head that gives its logits strip by strip, those of some ids at -inf."""

    def __init__(self, head: Any, gone: Sequence[int]):
        self.head, self.gone = head, gone

    def __getattr__(self, name: str) -> Any:
        """Sizes, and where several processes share the vocabulary what makes the head a part of it."""
        return getattr(self.head, name)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[R, V]."""
        return self.head(hidden).index_fill_(1, torch.tensor(self.gone, device=hidden.device), -torch.inf)

    def strips(self, hidden: Tensor) -> Iterator[Tensor]:
        """[R, C] each."""
        start = getattr(self.head, "first", 0)
        for strip in self.head.strips(hidden):
            stop = start + strip.shape[-1]
            for token in self.gone:
                if start <= token < stop:
                    strip[:, token - start] = -torch.inf
            yield strip
            start = stop
