"""Replay recorded runs of block-causal models and of their kin: tokens after every pass, and logits.

`tests/golden/families/README.md` describes the files. `LOOPS` says, by what tells a published loop's settings apart,
what they are called here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dkv.common.bar import counted
from dkv.engine.config import DiffusionConfig
from dkv.engine.engine import Engine, StepResult
from dkv.engine.run import Run
from dkv.tools.recorded import Case, Mismatch

LOGIT_TOLERANCE = 2e-4
STORE = 1  # In `call_kind`: a pass that only stores, after which nothing has changed.


@dataclass
class Recorded:
    """A recorded run in our words.

    Attributes:
        settings: of `dkv.generate`.
        spec: what the run had in place of the fields of the model's spec.
        prompts: int64 [P] of each row.
        canvases: after every pass, int64 [B, L]; -1 where there is no slot yet.
        logits: of some passes, by their numbers: the column of the first slot, and [B or 1, n, V].
        columns: of every row, the column of its slot 0.
    """

    settings: dict[str, Any]
    spec: dict[str, Any]
    prompts: list[Tensor]
    canvases: Tensor
    logits: dict[int, tuple[int, Tensor]]
    columns: Sequence[int] = (0,)


def _logits(t: dict[str, Tensor], name: str, first: Callable[[int], int]) -> dict[int, tuple[int, Tensor]]:
    """The logits of a run by the numbers of their passes; `first` gives the column of their first slot."""
    found = {int(key[len(name) :]): value for key, value in t.items() if key.startswith(name)}
    return {number: (first(number), x if x.dim() == 3 else x[None]) for number, x in found.items()}


def _llada2(case: Case, t: dict[str, Tensor]) -> Recorded:
    s, x = case.settings, t["x_steps"].long()
    length = s["block_length"]
    blocks = x.shape[1] // length - s["prompt_length"] // length
    settings = {"max_new_tokens": s["gen_length"], "threshold": s["threshold"] if s["threshold"] <= 1 else None}
    if case.facts["variant"] == "2.0":
        settings["steps"] = blocks * min(s["steps"], s["gen_length"] // s["minimal_topk"])
    else:
        # The loop has no number of steps, but one of tokens a step.
        settings["steps"] = blocks * -(-length // s["num_to_transfer"])
        settings |= {"edit_threshold": s["editing_threshold"], "post_steps": s["max_post_steps"]}
    logits = _logits(t, "logits_step", lambda step: int(t["step_block"][step]) * length)
    return Recorded(settings, _block(length), [t["prompt"][0]], x[:, None], logits)


def _sdar(case: Case, t: dict[str, Tensor]) -> Recorded:
    s, length = case.settings, case.settings["block_length"]
    x = t["x_calls"].long()
    blocks = x.shape[1] // length - s["prompt_length"] // length
    settings = {"max_new_tokens": s["gen_length"], "steps": s["denoising_steps"] * blocks}
    if s["remasking_strategy"] == "low_confidence_dynamic":
        settings["threshold"] = s["confidence_threshold"]
    elif s["remasking_strategy"] == "sequential":
        settings["confidence"] = "sequential"
    logits = _logits(t, "logits_call", lambda call: int(t["call_block"][call]) * length)
    return Recorded(settings, _block(length), [t["prompt"][0]], x[:, None], _denoising(logits, t))


def _fast(case: Case, t: dict[str, Tensor]) -> Recorded:
    s, x = case.settings, t["x_calls"].long()
    settings = {
        "max_new_tokens": x.shape[1] - s["prompt_length"],
        "block_length": s["small_block_size"],
        "threshold": s["threshold"],
        "cache": "dual" if s["use_block_cache"] else None,
    }
    logits = _logits(t, "logits_call", lambda call: int(t["call_start"][call]))
    return Recorded(settings, _block(s["block_size"]), [t["prompt"][0]], x[:, None], _denoising(logits, t))


def _a2d(case: Case, t: dict[str, Tensor]) -> Recorded:
    s, x = case.settings, t["x_steps"].long()
    prompts = [t[f"prompt_{row}"] for row in range(x.shape[1])]
    settings = {"max_new_tokens": s["max_new_tokens"], "steps": s["steps"], "quotas": "rounded"}
    spec, columns = {"attention": "full", "shifted": s["right_shift_logits"]}, [0] * len(prompts)
    if case.facts["sampler"] == "bd3lm":
        spec |= _block(s["block_size"]) | {"blocks_from_prompt": True}
        columns = [x.shape[2] - s["max_new_tokens"] - len(prompt) for prompt in prompts]
    else:
        settings |= {"block_length": s["block_size"], "schedule": "blocks", "cfg_scale": s["cfg_scale"]}
    # The first canvas is the start. Only the logits of whole canvases say where they begin.
    logits = _logits(t, "logits_step", lambda step: 0) if case.facts["sampler"] == "mdlm" else {}
    return Recorded(settings, spec, prompts, x[1:], logits if s["cfg_scale"] == 0 else {}, columns)


def _nemotron(case: Case, t: dict[str, Tensor]) -> Recorded:
    s, x = case.settings, t["canvas"].long()
    settings = {"max_new_tokens": s["max_new_tokens"], "threshold": s["threshold"]}
    if case.facts["mode"] == "linear_spec":
        settings["schedule"] = "speculative"
    return Recorded(settings, {"block_length": s["block_length"]}, [t["prompt"][0]], x[:, None], {})


def _llada(case: Case, t: dict[str, Tensor]) -> Recorded:
    settings = {name: case.settings[name] for name in ("gen_length", "block_length", "steps", "remasking")}
    logits = _logits(t, "logits_step", lambda step: 0)
    return Recorded({**settings, "schedule": "blocks"}, {}, [t["prompt"][0]], t["x_steps"].long()[:, None], logits)


# By a setting or fact that only its runs have.
LOOPS: dict[str, Callable[[Case, dict[str, Tensor]], Recorded]] = {
    "num_to_transfer": _llada2,
    "remasking_strategy": _sdar,
    "small_block_size": _fast,
    "sampler": _a2d,
    "mode": _nemotron,
    "remasking": _llada,
}


def _block(length: int) -> dict[str, Any]:
    return {"attention": "block", "block_length": length}


def _denoising(logits: dict[int, tuple[int, Tensor]], t: dict[str, Tensor]) -> dict[int, tuple[int, Tensor]]:
    """Without those of passes that only store, or of a prompt."""
    return {call: found for call, found in logits.items() if int(t["call_kind"][call]) in (0, 3)}


def is_family(case: Case) -> bool:
    """Whether a case is one of this format."""
    return case.facts.get("kind") in ("generate", "forward")


def check_family(case: Case, model: Any) -> str:
    """Replay a case.

    Returns:
        What was compared, in words.

    Raises:
        Mismatch: what differs, where, and the two values.
        ValueError: no published loop has such settings.
    """
    if case.facts["kind"] == "forward":
        return _check_forward(case, model)
    known = {**case.facts, **case.settings}
    loop = next((loop for name, loop in LOOPS.items() if name in known), None)
    if loop is None:
        raise ValueError(f"the recorded run has the settings of no loop that is known here: {', '.join(case.settings)}")
    own, recorded = model.spec, loop(case, case.tensors)
    model.spec = replace(own, **recorded.spec)
    try:
        return _check_run(recorded, model, case)
    finally:
        model.spec = own


def _check_run(recorded: Recorded, model: Any, case: Case) -> str:
    steps: list[tuple[list[Tensor], Tensor | None]] = []

    def watch(engine: Any, result: StepResult | None) -> None:
        steps.append(([text.clone() for text in engine.rows.texts()], _own_logits(engine, result)))

    drafts = recorded.settings.get("schedule") == "speculative"
    every = {} if drafts else {"output_logits": True}
    output = _replay(model, recorded, watch, every)
    mask, seeded = model.spec.mask_token_id, model.spec.seeded and not model.spec.shifted and not drafts
    edits, before, at, worst = "edit_threshold" in recorded.settings, _start(recorded, mask), 0, 0.0
    for number, canvas in enumerate(recorded.canvases):
        wanted = _in_slots(canvas, recorded, mask)
        if not edits and all(map(torch.equal, wanted, before)):
            continue  # A pass that only stores.
        before = wanted
        # A recorded canvas has the first token of a block only after the next pass.
        at += seeded and not _same(steps[at][0], wanted)
        _compare(steps[at][0], wanted, number)
        if number in recorded.logits:
            worst = max(worst, _compare_logits(steps[at][1], recorded, number))
        at += 1
    fast = _replay(model, recorded, None, {})
    if not torch.equal(fast.sequences, output.sequences):
        raise Mismatch("the tokens differ where logits are not recorded")
    logits = f", logits within {worst:.1e}" if recorded.logits else ""
    published = case.facts.get("forwards", len(recorded.canvases))
    share = f"{output.stats.computed_share:.0%} of the slots computed"
    return f"{counted(at, 'pass')} of {published} published, {share}{logits}"


def _replay(model: Any, recorded: Recorded, watch: Any, more: dict[str, Any]) -> Any:
    width = max(map(len, recorded.prompts))
    ids, mask = (torch.zeros(len(recorded.prompts), width, dtype=torch.int64) for _ in range(2))
    for row, prompt in enumerate(recorded.prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    config = DiffusionConfig(**recorded.settings, **more)
    with torch.no_grad():
        ids, run = Run.after_prompts(model, ids, mask, config, ends=False, on_step=watch)
        return run.to_the_end(None, ids, new=width)


def _own_logits(engine: Engine, result: StepResult | None) -> Tensor | None:
    """[B, S, V]: the logits of the slots that a pass computed, NaN elsewhere."""
    if result is None or result.forward is None or not result.forward.every:
        return None
    packed, head = result.forward.packed, engine.model.head(result.forward.hidden)
    rows, slots = engine.rows.masked.shape
    wide = head.new_full((engine.branches * rows, slots + 1, head.shape[1]), torch.nan)
    wide[packed.rows, packed.positions] = head[: len(packed.rows)]
    return wide[:rows, :-1]


def _start(recorded: Recorded, mask: int) -> list[Tensor]:
    """By row, its slots before the first pass."""
    new = [
        recorded.canvases.shape[2] - column - len(p)
        for column, p in zip(recorded.columns, recorded.prompts, strict=True)
    ]
    return [torch.cat((p.long(), p.new_full((n,), mask).long())) for p, n in zip(recorded.prompts, new, strict=True)]


def _in_slots(canvas: Tensor, recorded: Recorded, mask: int) -> list[Tensor]:
    """A recorded canvas [B, L] by row, from its slot 0 on."""
    return [torch.where(row < 0, mask, row)[first:] for row, first in zip(canvas, recorded.columns, strict=True)]


def _same(tokens: list[Tensor], wanted: list[Tensor]) -> bool:
    pairs = [(mine[: len(row)], row[: len(mine)]) for mine, row in zip(tokens, wanted, strict=True)]
    return all(torch.equal(*pair) for pair in pairs)


def _compare(tokens: list[Tensor], wanted: list[Tensor], number: int) -> None:
    for row, (mine, expected) in enumerate(zip(tokens, wanted, strict=True)):
        size = min(len(mine), len(expected))
        if not torch.equal(mine[:size], expected[:size]):
            slot = int((mine[:size] != expected[:size]).nonzero()[0])
            here, recorded = int(mine[slot]), int(expected[slot])
            raise Mismatch(f"pass {number}, row {row}, slot {slot}: token {here}, recorded {recorded}")


def _compare_logits(own: Tensor, recorded: Recorded, number: int) -> float:
    """The largest difference of a pass's logits at the slots that both have."""
    (first, logits), worst = recorded.logits[number], 0.0
    for row, expected in enumerate(logits.expand(len(own), -1, -1)):
        start = first - recorded.columns[row]
        mine = own[row, max(start, 0) : start + len(expected)]
        gap = (mine - expected[max(-start, 0) :][: len(mine)]).abs().nan_to_num(0).max().item()
        if gap > LOGIT_TOLERANCE:
            raise Mismatch(f"pass {number}, row {row}: logits differ by {gap:.2e}, more than {LOGIT_TOLERANCE:.0e}")
        worst = max(worst, gap)
    return worst


def _check_forward(case: Case, model: Any) -> str:
    """Whole sequences without a buffer, by each kind of attention that was recorded."""
    t, length = case.tensors, case.facts.get("block_length")
    ids = t["input_ids"].long()
    slot = torch.arange(ids.shape[1]).expand_as(ids)
    # By the recorded logits, which block each slot is in.
    blocks = {
        "logits": slot // length if length else torch.zeros_like(slot),
        "logits_full_attention": torch.zeros_like(slot),
        "logits_causal": slot,
        "logits_bidirectional": torch.zeros_like(slot),
    }
    found = {name: (model(ids, block_ids=of) - t[name]).abs().max().item() for name, of in blocks.items() if name in t}
    for name, gap in found.items():
        if not gap <= LOGIT_TOLERANCE:
            raise Mismatch(f"{name} differ by {gap:.2e}, more than {LOGIT_TOLERANCE:.0e}")
    return f"{', '.join(name.replace('_', ' ') for name in found)} within {max(found.values()):.1e}"
