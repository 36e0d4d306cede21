"""The record of a generation: which step computed and decoded which slot, and how sure the model was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dkv.engine.config import DiffusionConfig
from dkv.engine.engine import Engine, StepResult
from dkv.engine.generate import config_of
from dkv.engine.in_blocks import block_rule
from dkv.engine.inputs import check_helpers, checked_inputs
from dkv.engine.output import Stats
from dkv.engine.records import entering, visible
from dkv.engine.run import Run
from dkv.policies import Policy

# What `dkv.generate` has to keep of every step.
KEPT = {"output_history": True, "output_active": True, "output_confidences": True}
# What a slot is in a step: numbers of `Trace.kinds`, and what they are called in legends.
KINDS = ("not seen", "reused", "stopped early", "computed", "full pass")
HIDDEN, REUSED, STOPPED, COMPUTED, FULL = range(len(KINDS))
UNREADABLE = "\ufffd"


@dataclass(frozen=True)
class Trace:
    """One generation of one prompt, step by step. Steps and slots count from 0, the prompt's slots come first.

    Attributes:
        model: its name.
        policy: of the cache, as it is written in Python.
        prompt: how many slots the prompt takes.
        blocks: the first slot of every block of the answer.
        ids: int64 [S], the tokens in the end.
        texts: [S] the same as text, special tokens by their names. A character that spans several tokens
            stands at the first of them, the others are empty.
        special: bool [S], where a special token stands in the end.
        decoded: int64 [S], the step that decoded a slot; -1 in the prompt, and beyond an early end.
        computed: bool [steps, S], the slots that the policy named in a step.
        through: bool [steps, S], those of them that went through all layers.
        work: float64 [steps], how many there are, those that stopped early counted by their share of the layers.
        visible: bool [steps, S], the slots that a step may compute and see.
        confidences: float32 [steps, S], as in `DiffusionOutput`.
        stats: of the generation.
    """

    model: str
    policy: str
    prompt: int
    blocks: tuple[int, ...]
    ids: np.ndarray
    texts: tuple[str, ...]
    special: np.ndarray
    decoded: np.ndarray
    computed: np.ndarray
    through: np.ndarray
    work: np.ndarray
    visible: np.ndarray
    confidences: np.ndarray
    stats: Stats

    @property
    def steps(self) -> int:
        return self.computed.shape[0]

    @property
    def slots(self) -> int:
        return self.computed.shape[1]

    @cached_property
    def full(self) -> np.ndarray:
        """bool [steps]: every slot that is visible was computed, by all layers."""
        return (self.through == self.visible).all(1)

    @cached_property
    def kinds(self) -> np.ndarray:
        """uint8 [steps, S]: what every slot is in a step, a number of `KINDS`."""
        through = np.where(self.full[:, None], FULL, COMPUTED)
        which = ~self.visible, self.through, self.computed
        return np.select(which, (HIDDEN, through, STOPPED), REUSED).astype(np.uint8)

    @property
    def passes(self) -> int:
        """Steps with anything to compute."""
        return int(self.computed.any(1).sum())

    @property
    def computed_share(self) -> float:
        """Slots computed, layer for layer, as a share of those that as many full passes compute."""
        return float(self.work.sum() / (self.passes * self.slots))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON: runs of slots as [first, last + 1]."""
        slots = [
            {"id": int(number), "text": text, "decoded": None if step < 0 else int(step)}
            for number, text, step in zip(self.ids, self.texts, self.decoded, strict=True)
        ]
        return {
            **{name: getattr(self, name) for name in ("model", "policy", "computed_share", "prompt")},
            "blocks": list(self.blocks),
            "slots": slots,
            "steps": [self._step(step) for step in range(self.steps)],
            "stats": self.stats.to_dict(),
        }

    def _step(self, step: int) -> dict[str, Any]:
        row = self.confidences[step].tolist()
        return {
            "full": bool(self.full[step]),
            "computed": _runs(self.computed[step]),
            "stopped": _runs(self.computed[step] & ~self.through[step]),
            "hidden": _runs(~self.visible[step]),
            "decoded": np.flatnonzero(self.decoded == step).tolist(),
            # JSON has no infinity: the logarithm of a margin of 0.
            "confidences": {s: x if x > -np.inf else None for s, x in enumerate(row) if x == x},
        }


@torch.no_grad()
def record(
    model: Any,
    tokenizer: Any,
    input_ids: Tensor | Mapping,
    generation_config: DiffusionConfig | None = None,
    streamer: Any = None,
    name: str | None = None,
    **overrides: Any,
) -> Trace:
    """Generate, and keep what every step did.

    Args:
        model: from `dkv.load` or `dkv.wrap`.
        tokenizer: of the model, which gives the tokens as text.
        input_ids: integers [1, P], one prompt without padding; or the encoding of a tokenizer that holds them.
        generation_config, streamer, overrides: as for `dkv.generate`.
        name: of the model, for titles; default: its family.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: more than one prompt, nothing to generate, or what `dkv.generate` refuses.
    """
    if not callable(getattr(tokenizer, "decode", None)) or isinstance(tokenizer, type | bytes):
        raise TypeError(f"tokenizer must be that of the model, dkv.load_tokenizer(path), got {tokenizer!r}")
    config = config_of(generation_config, {**overrides, **KEPT})
    ids, real = checked_inputs(model, input_ids, None, config)
    if len(ids) != 1 or not real.all():
        found = list(ids.shape) if len(ids) != 1 else "padding"
        raise ValueError(f"input_ids must be [1, P], as a trace is of one prompt; got {found}")
    if config.of_row("max_new_tokens", 0) == 0:
        raise ValueError("max_new_tokens is 0: a trace needs at least one slot to fill")
    check_helpers(config, None, streamer)
    seen: list[Tensor] = []
    through: list[Tensor] = []

    def watch(engine: Engine, result: StepResult) -> None:
        seen.append(visible(engine, result)[0])
        through.append(entering(engine, result)[:, 0])

    ids, run = Run.after_prompts(model, ids, None, config, on_step=watch)
    prompt = ids.shape[1]
    output = run.to_the_end(streamer, ids, new=prompt)
    ids = output.sequences[0].tolist()
    new = len(ids) - prompt
    mask = model.spec.mask_token_id if config.mask_token_id is None else config.mask_token_id
    # A token stays, so a slot was decoded by the step that follows those that left it a mask.
    decoded = (output.history[:, 0, prompt:] == mask).sum(0)
    # Beyond the end of the text is padding.
    decoded[output.stats.new_tokens :] = -1
    rule = block_rule(model.spec, config)
    part = config.block_length or (rule.length if rule else new)
    # Blocks may be counted from slot 0; a region that slides has no places of its own.
    first = prompt if rule is None else prompt - (prompt + rule.offset(prompt)) % part
    layers = torch.stack(through).cpu().numpy()
    return Trace(
        model=name or model.spec.family,
        policy=label(config.cache),
        prompt=prompt,
        blocks=(prompt, *range(first + part, prompt + new, part)) if config.region is None else (prompt,),
        ids=np.array(ids),
        texts=tuple(texts_of(tokenizer, ids)),
        special=np.isin(ids, tokenizer.all_special_ids),
        decoded=np.concatenate((np.full(prompt, -1), decoded.cpu().numpy())),
        computed=output.active[:, 0].cpu().numpy(),
        through=layers[:, -1],
        work=layers[:, :-1].mean(1).sum(1),
        visible=torch.stack(seen).cpu().numpy(),
        confidences=output.confidences[:, 0].cpu().numpy(),
        stats=output.stats,
    )


def label(policy: Policy) -> str:
    """A policy as it is written in Python: its main arguments, and those that are not as by default."""
    given = {f.name: getattr(policy, f.name) for f in fields(policy)}
    default = {f.name: f.default for f in fields(policy)}
    shown = [f"{n}={v!r}" for n, v in given.items() if n in ("refresh", "window") or v != default[n]]
    return f"{type(policy).__name__}({', '.join(shown)})"


def texts_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Every token as text. A character of several tokens goes to the first, and nothing to the others."""
    texts: list[str] = []
    while len(texts) < len(ids):
        start = len(texts)
        # A character has four bytes at most, and hence four tokens.
        for stop in range(start + 1, min(start + 4, len(ids)) + 1):
            text = tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if UNREADABLE not in text:
                texts += [text, *[""] * (stop - start - 1)]
                break
        else:
            texts.append(UNREADABLE)
    return texts


def _runs(held: np.ndarray) -> list[list[int]]:
    """Where a bool [S] holds, as runs [first, last + 1]."""
    edges = np.flatnonzero(np.diff(held.astype(np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2).tolist()
