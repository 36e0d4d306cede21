"""What a generation returns."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from dkv.core.kv_cache import KVCache


@dataclass
class Stats:
    """What a generation cost, and what is needed to repeat it.

    Attributes:
        passes, full_passes: forward passes, and those that computed every slot that was not hidden.
        computed_slots, total_slots: slots sent through the network, and what plain decoding sends.
        skipped_slots: what is to be taken from these, as slots of a pass left the network before its end: each counts
            as the share of the layers that it did not go through.
        replayed_passes: those that were replayed from a graph.
        graphs, graph_bytes: graphs that stood ready after the last one was made, those of earlier generations of the
            kind among them, and the memory of the device that was reserved for them; 0 where none was made.
        eager_reason: why steps were, or from some step on were, taken as they came; None: they were not.
        merged_stores: of a block-causal model, passes that were spared because the one that begins a block stores what
            stands before it as well, all rows.
        reused_slots: slots whose keys and values were taken over from an earlier generation, all rows.
        new_tokens: slots filled, all rows; without those beyond the end of a row.
        seconds: wall time of the whole call.
        seed: of the random numbers; a list if they were drawn or given row by row.
        settings: the configuration, versions, dtype, device and backend.
    """

    passes: int = 0
    full_passes: int = 0
    computed_slots: int = 0
    total_slots: int = 0
    skipped_slots: float = 0
    replayed_passes: int = 0
    graphs: int = 0
    graph_bytes: int = 0
    eager_reason: str | None = None
    merged_stores: int = 0
    reused_slots: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    seed: int | list[int] = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def add_pass(self, computed: int, total: int, full: bool = False, skipped: float = 0) -> None:
        """Count a pass: its slots, those of plain decoding, whether it was full, and what it skipped of these."""
        self.passes += 1
        self.full_passes += full
        self.computed_slots += computed
        self.total_slots += total
        self.skipped_slots += skipped

    @property
    def cached_passes(self) -> int:
        return self.passes - self.full_passes

    @property
    def computed_work(self) -> float:
        """Slots sent through the network; one that left it early counts as the share of its layers that it saw."""
        return self.computed_slots - self.skipped_slots

    @property
    def computed_share(self) -> float:
        """Slots computed, layer for layer, as a share of those that plain decoding computes; 0 without a pass."""
        return self.computed_work / max(self.total_slots, 1)

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / max(self.seconds, 1e-9)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens of all rows per pass of the batch."""
        return self.new_tokens / max(self.passes, 1)

    def to_dict(self) -> dict[str, Any]:
        derived = ("cached_passes", "computed_share", "tokens_per_second", "tokens_per_forward")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


@dataclass
class DiffusionOutput(ModelOutput):
    """The result of `dkv.generate` and `dkv.infill`, and a state of `dkv.stream`.

    Attributes:
        sequences: int64 [B, P + new], the prompt as it was given and the new tokens. What a row has less than the
            longest, and what it has beyond its end, is padding.
        kv_cache: keys and values of all rows, for the next turn of a chat
            (`dkv.generate(..., kv_cache=output.kv_cache)`). It lives as long as the output does.
        history: int64 [steps, B, P + new], the canvas after each step (`output_history`).
        active: bool [steps, B, P + new], the slots each pass computed (`output_active`); padding
            never is.
        confidences: float32 [steps, B, P + new] (`output_confidences`), the logarithm of the probability or margin, or
            the negative entropy in nats, of each slot that the pass ranked: the masked slots of its block, of these
            what the policy computed through all layers, and with `Rollout` also what it computed of later blocks; NaN
            elsewhere. The "random" rule ranks none: there, the log probability of the tokens decoded. Slots that
            `confidence_eos_eot_inf` holds back have -inf. `certainty` and `selection_temperature` are not in it.
        logits: one [B, P + new, V] per step, raw (not shifted), 0 where a slot was not computed, or left the network
            early (`output_logits`).
        stats: `Stats`.
    """

    sequences: Tensor | None = None
    history: Tensor | None = None
    active: Tensor | None = None
    confidences: Tensor | None = None
    logits: tuple[Tensor, ...] | None = None
    stats: Stats | None = None
    kv_cache: KVCache | None = None
