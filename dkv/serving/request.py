"""One request, from its arrival to its end."""

import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dkv.engine.config import DiffusionConfig

WAITING, RUNNING, FINISHED, CANCELLED, FAILED = "waiting", "running", "finished", "cancelled", "failed"


@dataclass
class RequestStats:
    """When a request came, and how it went on; in seconds of a monotonic clock.

    Attributes:
        arrived, started, first_token, ended: when it was added, was given a row, had a token in its first slot to fill
            (finished, where there is none), and was finished, cancelled or failed; None: not yet.
        passes: in which it had slots to fill.
        new_tokens: slots filled; without those beyond an end token.
    """

    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None
    passes: int = 0
    new_tokens: int = 0

    @property
    def queued_seconds(self) -> float:
        """How long it waited for a row, until now if it still does."""
        return self._until(self.started if self.started is not None else self.ended)

    @property
    def first_token_seconds(self) -> float | None:
        """From its arrival to the first settled token; None: there is none yet."""
        return None if self.first_token is None else self.first_token - self.arrived

    @property
    def seconds(self) -> float:
        """From its arrival to its end, or until now."""
        return self._until(self.ended)

    @property
    def tokens_per_second(self) -> float:
        """New tokens by the seconds in which it had a row."""
        if self.started is None:
            return 0.0
        return self.new_tokens / max(self.seconds - self.queued_seconds, 1e-9)

    def _until(self, end: float | None) -> float:
        return (time.perf_counter() if end is None else end) - self.arrived

    def to_dict(self) -> dict[str, Any]:
        names = ("queued_seconds", "first_token_seconds", "seconds", "passes", "new_tokens", "tokens_per_second")
        return {name: getattr(self, name) for name in names}


@dataclass(eq=False)
class Request:
    """What `LLM.add` gives back; changed by `LLM.step` alone.

    Attributes:
        number: in the order of arrival, from 0.
        input_ids: int64 [1, P], the prompt, or a text whose masks are to be filled.
        config: its settings, with a seed.
        processor: its own logits processor; None: it has none.
        state: "waiting", "running", "finished", "cancelled" or "failed".
        tokens: int64 [new] on the CPU, what was written, or the filled text, of a finished request; of a cancelled one,
            as it was then, with the mask id where there was no token. None before.
        error: why it failed.
        stats: `RequestStats`.
        row: which it has, while it runs.
        gap: the first mask of a text whose masks are to be filled; None: a prompt is continued.
        logprobs: float32 [new] on the CPU, the logarithm of the probability that each token had in the pass that filled
            its slot; of a finished request that asks for them, `wants_logprobs`. Beyond an end they mean nothing.
        settled: how many of its new tokens stand before the first slot without one. They stay as they are, but where
            `edit_threshold` lets them change.
        key: what it has in common with those that share its passes.
        watched: whether `computed` is kept; whoever wants it sets this.
        computed: bool [stop], the slots that its last step computed; None: it had none, or is not watched.
    """

    number: int
    input_ids: Tensor
    config: DiffusionConfig
    processor: Any = None
    state: str = WAITING
    tokens: Tensor | None = None
    error: Exception | None = None
    stats: RequestStats = field(default_factory=RequestStats)
    row: int | None = None
    gap: int | None = None
    wants_logprobs: bool = False
    logprobs: Tensor | None = None
    settled: int = 0
    key: str = ""
    watched: bool = False
    computed: Tensor | None = None

    @property
    def start(self) -> int:
        """The first slot of those that are told: all of a text, or those that follow a prompt."""
        return self.input_ids.shape[1] if self.gap is None else 0

    @property
    def stop(self) -> int:
        """The slot after the last one that is told."""
        return self.start + self.new

    @property
    def new(self) -> int:
        """Slots that are told."""
        return self.config.of_row("max_new_tokens", 0) if self.gap is None else self.input_ids.shape[1]

    @property
    def done(self) -> bool:
        """Whether it is finished, cancelled or failed."""
        return self.state not in (WAITING, RUNNING)

    def settle(self, first: int, now: float) -> None:
        """Note which slot is the first without a token, or `stop`, at a time."""
        self.settled = min(first, self.stop) - self.start
        if first > (self.start if self.gap is None else self.gap) and self.stats.first_token is None:
            self.stats.first_token = now

    def end(self, state: str, tokens: Tensor | None = None, error: Exception | None = None) -> None:
        """Note that nothing more comes."""
        self.state, self.tokens, self.error, self.row = state, tokens, error, None
        self.stats.ended = time.perf_counter()
