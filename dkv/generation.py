"""`dkv.generate`: fill a canvas step by step, computing only the slots that a policy names."""

import copy
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dkv import kernels
from dkv.canvas import Canvas
from dkv.config import DiffusionConfig
from dkv.inputs import checked_inputs
from dkv.output import DiffusionOutput
from dkv.randomness import Numbers, Randomness
from dkv.sampler import Pass, Sampler
from dkv.version import versions


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    generation_config: DiffusionConfig | None = None,
    streamer: Any = None,
    generator: torch.Generator | None = None,
    numbers: Numbers | None = None,
    **overrides: Any,
) -> DiffusionOutput:
    """Continue prompts with a diffusion language model.

    Args:
        model: from `dkv.load` or `dkv.wrap`.
        input_ids: integers [B, P], prompts of one batch, padded on either side. A mask id in a
            prompt is left as it is.
        attention_mask: [B, P], 0 at padding; None: no padding. Padding is told by this mask alone,
            is never computed, and does not count in positions.
        generation_config: settings; None: the defaults of `DiffusionConfig`.
        streamer: has `put(ids)` and `end()` as in transformers; gets the prompts [B, P] first and
            the sequences [B, P + new] last, and with a `put_draft(ids)` the canvas after every step.
        generator: source of the seed if the settings have none; default: torch's own.
        numbers: callable (step, (B, P + new)) -> uniform numbers, used for random orders instead of
            our own: once per step for the "random" rule, once per block for `Greedy`.
        overrides: settings that replace those of the configuration.

    Returns:
        `DiffusionOutput`; its `sequences` [B, P + new_tokens] keep the prompts as they came.

    Raises:
        ValueError, IndexError: the inputs or settings are impossible, or the logits hold NaN.

    Example:
        >>> model = dkv.load("tiny")
        >>> output = dkv.generate(model, ids, max_new_tokens=64, cache=dkv.Decode(refresh=8))
        >>> output.sequences[:, ids.shape[1]:], output.stats.computed_share
    """
    start = time.perf_counter()
    config = DiffusionConfig() if generation_config is None else copy.copy(generation_config)
    config.update(**overrides)
    input_ids, attention_mask = checked_inputs(model, input_ids, attention_mask, config)
    mask_id = model.spec.mask_token_id if config.mask_token_id is None else config.mask_token_id
    seed = config.seed
    if seed is None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device if generator else "cpu"))
    canvas = Canvas(input_ids, attention_mask, config.max_new_tokens, mask_id)
    sampler = Sampler(model, canvas, config, Randomness(seed, canvas, numbers), mask_id)
    kept = {name: [] for name in RECORDS if getattr(config, f"output_{name}")}
    if streamer is not None:
        streamer.put(input_ids.cpu())
    draft = getattr(streamer, "put_draft", None)
    for step in config.plan(model.spec.shifted):
        if sampler.masked_count == 0:
            break
        done = sampler.run(step)
        for name, records in kept.items():
            records.append(RECORDS[name](canvas, done, model))
        if draft is not None:
            draft(canvas.sequences().cpu())
    sampler.check()
    sequences = canvas.sequences()
    if streamer is not None:
        streamer.put(sequences.cpu())
        streamer.end()
    stats = replace(
        sampler.stats, seed=seed, seconds=time.perf_counter() - start,
        new_tokens=len(input_ids) * config.max_new_tokens,
        settings={**config.settings(), **versions(), "dtype": str(model.dtype), "device": str(model.device)},
    )  # fmt: skip
    # The logits of all steps together would be twice as large while they are stacked.
    found = {name: tuple(of) if name == "logits" else torch.stack(of) for name, of in kept.items() if of}
    return DiffusionOutput(sequences=sequences, stats=stats, **found)


def _history(canvas: Canvas, done: Pass | None, model: Any) -> Tensor:
    """int64 [B, P + new]: the canvas."""
    return canvas.sequences()


def _active(canvas: Canvas, done: Pass | None, model: Any) -> Tensor:
    """bool [B, P + new]: the slots that a pass computed."""
    if done is None:
        return canvas.to_caller(torch.zeros_like(canvas.masked))
    return canvas.to_caller(torch.ones_like(canvas.masked) if done.active is None else done.active.mask)


def _confidences(canvas: Canvas, done: Pass | None, model: Any) -> Tensor:
    """float32 [B, P + new]: the confidence of the slots that a pass ranked, NaN at the others."""
    batch, size = canvas.masked.shape
    wide = torch.full((batch, size + 1), torch.nan, device=canvas.tokens.device)
    if done is not None and done.confidence is not None:
        wide.scatter_(1, done.slots, done.confidence.float())
    padding = ~canvas.to_caller(torch.ones_like(canvas.masked))
    return canvas.to_caller(wide[:, :-1]).masked_fill(padding, torch.nan)


def _logits(canvas: Canvas, done: Pass | None, model: Any) -> Tensor:
    """[B, P + new, V]: the logits of the slots that a pass computed, 0 at the others."""
    batch, size = canvas.masked.shape
    wide = torch.zeros(batch, size + 1, model.spec.vocab_size, dtype=model.dtype, device=model.device)
    if done is not None:
        kernels.scatter_rows_(wide, done.positions, model.head(done.hidden), validate=False)
    return canvas.to_caller(wide[:, :-1])


# What can be kept of every step, by its name in `DiffusionOutput`; the setting is `output_` and the name.
RECORDS = {"history": _history, "active": _active, "confidences": _confidences, "logits": _logits}
