"""`dkv.generate`: fill a canvas step by step, computing only the slots that a policy names."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dkv.core.kv_cache import KVCache
from dkv.core.sequences import Sequences
from dkv.engine import canvas
from dkv.engine.config import DiffusionConfig
from dkv.engine.ending import StoppingCriteria
from dkv.engine.inputs import check_helpers, checked_inputs
from dkv.engine.output import DiffusionOutput
from dkv.engine.published_names import own_name
from dkv.engine.run import Run, Steps, mask_id_of
from dkv.engine.sampler import LogitsProcessor
from dkv.models.gemma import Gemma


def _by_name(function: Callable) -> Callable:
    """The function, which says what to write where settings are given by position, as LLaDA's code takes them."""

    @functools.wraps(function)
    def called(*given: Any, **named: Any) -> Any:
        if len(given) > 3:
            raise TypeError(
                f"{function.__name__} takes model, input_ids and attention_mask by position, got {len(given)}: give "
                "the others by name, such as generation_config=config or max_new_tokens=128"
            )
        return function(*given, **named)

    return called


@_by_name
@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor | Mapping,
    attention_mask: Tensor | None = None,
    *,
    generation_config: DiffusionConfig | None = None,
    streamer: Any = None,
    generator: torch.Generator | None = None,
    logits_processor: LogitsProcessor | None = None,
    stopping_criteria: StoppingCriteria | None = None,
    kv_cache: KVCache | None = None,
    **overrides: Any,
) -> DiffusionOutput:
    """Continue prompts with a diffusion language model.

    Rows are independent: each has its own length, budget, schedule, noise and end, and gets the tokens that it
    gets alone, whatever stands beside it.

    Args:
        model: from `dkv.load` or `dkv.wrap`. DiffusionGemma has settings of its own,
            `dkv.engine.canvas_settings.CanvasSettings`, and refuses others with the reason.
        input_ids: integers [B, P], prompts of one batch, padded on either side. A mask id in a
            prompt is left as it is; `dkv.infill` fills it. Or the encoding of a tokenizer, which holds them and
            their mask; `**encoding` does as well.
        attention_mask: [B, P], 0 at padding; None: no padding. Padding is told by this mask alone,
            is never computed, and does not count in positions.
        generation_config: settings; None: the defaults of `DiffusionConfig`.
        streamer: has `put(ids)` and, if it wants, `end()` as in transformers; gets the prompts [B, P] first and
            the new tokens [B, new] last, and with a `put_draft(ids)` those on the canvas after every step.
        generator: source of the seeds if the settings have none; default: torch's own.
        logits_processor: as in transformers, one or a `LogitsProcessorList`: (ids [n, length], scores [n, V]) ->
            scores. Called once a row and step, with the slots that may be filled as n, filled up to one of a few
            sizes; the ids of each are all the row on its canvas, without padding, the mask id where there is no token.
            Processors that go by the length of a text, such as `MinLengthLogitsProcessor`, find it always full.
        stopping_criteria: as in transformers, one or a `StoppingCriteriaList`; `dkv.engine.ending.Ending` says what
            they see. What a row has beyond its end becomes padding.
        kv_cache: `output.kv_cache` of an earlier call with this model, on as many rows. Keys and values
            of the prefix that a prompt shares with the earlier text are taken over instead of computed, where they
            are of tokens (the last ones decoded were not seen as such). They stay as the earlier call left them until
            the policy's first refresh after its first passes; with `PrefillCache` and `PrefillDecodeCache` for good.
            The cache given is copied, not changed.
        overrides: settings that replace those of the configuration, under any name that it knows.

    Returns:
        `DiffusionOutput`; its `sequences` [B, P + new] keep the prompts as they came.

    Raises:
        TypeError: an argument is of the wrong kind, or a setting is given by position.
        ValueError, IndexError: the inputs or settings are impossible, or the logits hold NaN.

    Example:
        >>> model = dkv.load("tiny")
        >>> output = dkv.generate(model, ids, max_new_tokens=64, cache=dkv.DecodeCache(refresh=8))
        >>> output.sequences[:, ids.shape[1]:], output.stats.computed_share
    """
    if isinstance(model, Gemma):
        given = {**overrides, "logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
        call = (model, input_ids, attention_mask, generation_config, given, generator, streamer, kv_cache)
        run = canvas.checked_run(*call)
        return run.to_the_end(streamer, run.ids, new=run.ids.shape[1])
    config = config_of(generation_config, overrides)
    check_helpers(config, generator, streamer)
    ids, run = Run.after_prompts(
        model,
        input_ids,
        attention_mask,
        config,
        generator=generator,
        processor=logits_processor,
        criteria=stopping_criteria,
        past=kv_cache,
    )
    return run.to_the_end(streamer, ids, new=ids.shape[1])


@_by_name
@torch.no_grad()
def infill(
    model: Any,
    input_ids: Tensor | Mapping,
    attention_mask: Tensor | None = None,
    *,
    generation_config: DiffusionConfig | None = None,
    streamer: Any = None,
    generator: torch.Generator | None = None,
    logits_processor: LogitsProcessor | None = None,
    **overrides: Any,
) -> DiffusionOutput:
    """Fill every mask of a text, and touch nothing else.

    Args:
        input_ids: integers [B, L], texts with the mask id wherever a token is to be found, padded on either side.
            Rows may have different numbers of masks, or none.
        attention_mask: [B, L], 0 at padding; None: no padding. A mask id in the padding stays.
        generation_config, overrides: as for `dkv.generate`, but for `max_new_tokens` and `max_length`: the slots to
            fill are the masks. Blocks are counted over the masks from left to right. End ids end nothing.
        streamer: gets `put(ids)` with the texts and then with the result, `put_draft(ids)` after every step.
        model, generator, logits_processor: as for `dkv.generate`.

    Returns:
        `DiffusionOutput`; its `sequences` [B, L] differ from `input_ids` at the masks alone.

    Raises:
        ValueError, IndexError: the inputs or settings are impossible, or the logits hold NaN.

    Example:
        >>> dkv.infill(model, torch.tensor([[5, mask, 7, mask]])).sequences
    """
    config = infill_config(generation_config, overrides)
    check_helpers(config, generator, streamer)
    ids, mask = checked_inputs(model, input_ids, attention_mask, config)
    mask_id = mask_id_of(model, config)
    rows = Sequences(ids, mask, mask & (ids == mask_id), mask_id)
    run = Run(model, rows, config, mask_id, generator, logits_processor, ends=False)
    return run.to_the_end(streamer, ids, new=0)


@_by_name
def stream(
    model: Any,
    input_ids: Tensor | Mapping,
    attention_mask: Tensor | None = None,
    *,
    generation_config: DiffusionConfig | None = None,
    generator: torch.Generator | None = None,
    logits_processor: LogitsProcessor | None = None,
    stopping_criteria: StoppingCriteria | None = None,
    kv_cache: KVCache | None = None,
    **overrides: Any,
) -> Iterator[DiffusionOutput]:
    """As `generate`, but yields the canvas after every step; steps are made as they are asked for.

    The arguments are those of `generate`; they are checked at once. The iterator may be dropped at any time.

    Yields:
        `DiffusionOutput` with the canvas as `sequences` [B, P + new], the mask id where there is no token yet, and
        the `stats` so far. The last one is what `generate` returns.

    Example:
        >>> for draft in dkv.stream(model, ids, max_new_tokens=64):
        ...     print(tokenizer.decode(draft.sequences[0]))
    """
    if isinstance(model, Gemma):
        given = {**overrides, "logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
        call = (model, input_ids, attention_mask, generation_config, given, generator, None, kv_cache)
        return _drafts(canvas.checked_run(*call))
    config = config_of(generation_config, overrides)
    check_helpers(config, generator)
    _, run = Run.after_prompts(
        model,
        input_ids,
        attention_mask,
        config,
        generator=generator,
        processor=logits_processor,
        criteria=stopping_criteria,
        past=kv_cache,
    )
    return _drafts(run)


@torch.no_grad()
def _drafts(run: Steps) -> Iterator[DiffusionOutput]:
    yield from run.drafts()


def config_of(given: DiffusionConfig | None, overrides: dict[str, Any]) -> DiffusionConfig:
    """The settings of one call, which may be changed."""
    if given is not None and not isinstance(given, DiffusionConfig):
        kind = type(given).__name__
        raise TypeError(
            f"generation_config must be a dkv.DiffusionConfig, got {kind}: make one, or give settings by name"
        )
    config = DiffusionConfig() if given is None else copy.copy(given)
    config.update(**overrides)
    return config


def infill_config(given: DiffusionConfig | None, overrides: dict[str, Any]) -> DiffusionConfig:
    """The settings of `infill`, which fills what is masked, whatever their budget."""
    lengths = ("max_new_tokens", "max_length")
    if named := [name for name, value in overrides.items() if own_name(name) in lengths and value is not None]:
        raise ValueError(f"{own_name(named[0])} does not go with infill, which fills every mask of input_ids")
    config = config_of(given, {**overrides, "max_new_tokens": 0})
    if config.edit_threshold is not None:
        raise ValueError("edit_threshold does not go with infill, which changes nothing but masks")
    if config.schedule == "speculative":
        raise ValueError('schedule="speculative" does not go with infill: it continues prompts')
    return config
