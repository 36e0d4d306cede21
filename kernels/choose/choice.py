"""How a token is chosen."""

from collections.abc import Sequence
from dataclasses import dataclass

RULES = ("probability", "margin", "entropy")
CONFIDENCE_DTYPES = ("exact", "model")


@dataclass(frozen=True)
class Choice:
    """The settings of a choice.

    Attributes:
        rule: "probability" (log p of the token), "margin" (log of best minus second best) or
            "entropy" (sum of p log p).
        temperature: 0 takes the best id; above 0 the id is drawn from softmax(logits / temperature). A temperature
            so low that it does not tell logits apart takes the best id, of equal ones the lowest.
        confidence_temperature: divides the logits before filters and confidence: 1 as LLaDA does,
            the temperature as Dream does.
        confidence_dtype: "exact", or "model": logits are divided, filtered, softmaxed and compared in their own dtype
            and the confidence is the logarithm of a rounded number, as in the code that Dream published. In bfloat16
            many confidences are then equal.
        top_k, top_p: ids outside are neither drawn nor counted; the best allowed id always stays.
        banned: ids that must not be chosen, for instance the mask.
        vocab_limit: ids from here on must not be chosen (embeddings wider than the tokenizer).
        entropy: whether to give, beside the confidence, the entropy of the distribution that it is of.

    Raises:
        ValueError: a setting is out of range.
    """

    rule: str = "probability"
    temperature: float = 0.0
    confidence_temperature: float = 1.0
    confidence_dtype: str = "exact"
    top_k: int | None = None
    top_p: float | None = None
    banned: Sequence[int] = ()
    vocab_limit: int | None = None
    entropy: bool = False

    def __post_init__(self):
        for name, known in (("rule", RULES), ("confidence_dtype", CONFIDENCE_DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or a positive number, got {self.temperature}")
        if not 0 < self.confidence_temperature < float("inf"):
            raise ValueError(f"confidence_temperature must be a positive number, got {self.confidence_temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {self.top_k}")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must be between 0 and 1 or None, got {self.top_p}")
        for name in ("temperature", "confidence_temperature"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "banned", tuple(dict.fromkeys(self.banned)))

    def limit(self, vocabulary: int) -> int:
        """The first id that must not be chosen because of `vocab_limit`."""
        return vocabulary if self.vocab_limit is None else self.vocab_limit

    def check(self, vocabulary: int) -> None:
        """Some id of a vocabulary of this size may be chosen.

        Raises:
            ValueError, IndexError: none may, or an id is outside the vocabulary.
        """
        if vocabulary == 0:
            raise ValueError("logits must have at least one id, got a vocabulary of 0")
        limit = self.limit(vocabulary)
        if not 1 <= limit <= vocabulary:
            raise ValueError(f"vocab_limit must be in 1..{vocabulary}, the size of the vocabulary, got {limit}")
        for token in self.banned:
            if not 0 <= token < vocabulary:
                raise IndexError(f"banned ids must be in 0..{vocabulary - 1}, got {token}")
        if sum(token < limit for token in self.banned) == limit:
            raise ValueError("banned leaves no id to choose")

    def filters(self, vocabulary: int) -> bool:
        """Whether top-k or top-p may drop an id."""
        return (self.top_k is not None and self.top_k < vocabulary) or (self.top_p is not None and self.top_p < 1)
