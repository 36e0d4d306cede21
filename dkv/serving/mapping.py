"""`dkv.map`: answers to many prompts, in their order."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dkv
from dkv.common.journal import Record
from dkv.engine.config import DiffusionConfig
from dkv.engine.generate import config_of
from dkv.models.tokenizer import load_tokenizer
from dkv.parallel import met, ranks_of
from dkv.serving.dataset import Run
from dkv.serving.devices import devices_of
from dkv.serving.job import Job
from dkv.serving.lines import from_rows
from dkv.serving.shared import follow


def map(
    model: Any,
    rows: Iterable[Mapping[str, Any] | str],
    *,
    tokenizer: Any = None,
    out: str | os.PathLike | None = None,
    devices: int | str | Sequence[str] | None = None,
    dtype: Any = None,
    chat: bool = False,
    max_slots: int | None = None,
    max_length: int | None = None,
    progress: bool = True,
    generation_config: DiffusionConfig | None = None,
    **settings: Any,
) -> list[Record]:
    """Answer many prompts, as many of them at a time as there is room for; each gets the tokens that it gets alone.

    Processes that share a model all call this, and all get the records; what is asked, and `out`, is the first one's.

    Args:
        model: a name, a folder or an id of the hub, as for `dkv.load`; or a model, on whose device it is done.
        rows: texts, or objects with an `id` (a text or a whole number; without any, the place of a row, from 1), and
            with `prompt`, a text or token ids, or `messages`, each with `role` and `content`. They may have
            `max_new_tokens`, `steps` and `seed` of their own. Other fields have no meaning.
        tokenizer: None: the one that comes with `model`, if that is a name; without one, prompts are token ids.
        out: a folder. Records are written to `results.jsonl` there as they come, and repeating the call goes on where
            it was, whatever ended it.
        devices: such as "cuda:1"; several, such as "cuda:0,cuda:1", or their number, have a process each, in which
            `model` is loaded by its name. As always with processes, a script must then make the call under
            `if __name__ == "__main__":`.
        dtype: as for `dkv.load`.
        chat: prompts are messages of a user, put into the tokenizer's chat template.
        max_slots: of all rows of a device; default: as for `dkv.LLM`.
        max_length: slots of a row and its answer, at most; default: as many as the model has.
        progress: show how far it is, and tell on standard error of rows that fail.
        generation_config, settings: of rows that do not say otherwise. Rows end at the ids that end a text, unless
            `eos_token_id` is given. A `seed` is that of the whole: each row's own is made of it and of its id.

    Returns:
        By row a dict with `id`, `line` (its place, from 1), and `text`, `tokens` (those of `dkv.generate` with the same
        settings and seed), `finish_reason` ("stop" at an end, or "length"), `seed` and `stats`; or with `error`, why it
        has none.

    Raises:
        BlockingIOError: another process is at work in `out`.
        Lost: one of the processes that share the model has gone.
        ChildProcessError: the process of a device has failed, or was killed; what was answered stays in `out`.
        ValueError: a setting is impossible, or `out` has results of other rows or settings.
        OSError: the model cannot be read, or `out` not be written.
    """
    chosen, loaded = devices_of(devices), hasattr(model, "spec")
    if loaded and (devices is not None or dtype is not None):
        raise ValueError("devices and dtype are for models that are given by name: this one is loaded already")
    ranks = ranks_of(model) if loaded else met()
    if ranks is not None and devices is not None:
        raise ValueError("devices has a model on each, and processes that have met share one: leave it out")
    if ranks is not None and ranks.rank:
        follow(model if loaded else dkv.load(model, dtype=dtype, ranks=ranks))
        return ranks.told()
    if tokenizer is None and not loaded:
        tokenizer = load_tokenizer(model)
    config = config_of(generation_config, settings)
    job = Job(
        model=model,
        tokenizer=tokenizer,
        config=config,
        loading={"dtype": dtype},
        chat=chat,
        devices=chosen,
        max_slots=max_slots,
        max_length=max_length,
    )
    with Run(from_rows(rows), job, None if out is None else Path(out), progress=progress) as run:
        run.go()
        records = run.records()
    if ranks is not None:
        ranks.told()
        ranks.told(records)
    return records
