"""Replay recorded runs of newer policies: tokens and sets of slots after every pass.

`tests/golden/policies/README.md` describes the files. `SETTINGS` says, by the `policy` of a run, what it is called
here, and `SETS` where a recorded set is found in a step.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dkv.common.bar import counted
from dkv.engine.engine import Engine, StepResult
from dkv.engine.records import entering, visible
from dkv.engine.replay import BlockEnd, replay
from dkv.tools.recorded import Case, Mismatch, compare

Facts = dict[str, Any]


def _suffix(f: Facts) -> Facts:
    cache = {"name": "suffix", "window": f["window"], "tail": f["tail"]}
    steps = f["steps"] if f["threshold"] is None else None
    return {"cache": cache, "threshold_decay": f["alpha"], "steps": steps, "pad_token_id": f["eos_id"]}


def _sliding(f: Facts) -> Facts:
    cache = {"name": "sliding", "prefix_window": f["prefix_window"]} if f["cached"] else None
    return {"cache": cache, "schedule": "sliding", "most": f["max_block_length"]}


def _entropy_bound(f: Facts) -> Facts:
    certainty = {"certainty": f["sigma"]} if "sigma" in f else {}
    return {"entropy_bound": f["gamma"], "entropy_form": "code", **certainty}


def _skip(f: Facts) -> Facts:
    every = {"block_every": f["block_update_freq"], "prompt_every": f["prompt_update_freq"]}
    return {"cache": {"name": "skip", "shares": f["proportion_steps"], "alpha": f["alpha"], **every}}


def _rollout(f: Facts) -> Facts:
    given = {"rollout_p": f["rollout_p"], "current_k": f["current_k"], "inflate_w": f["inflate_w"]}
    return {"cache": {"name": "rollout", "sigma": f["sigma_cache"], **given}, "certainty": f.get("sigma")}


# By the recorded policy, the settings of `dkv.generate`, beside those that all runs have.
SETTINGS: dict[str, Callable[[Facts], Facts]] = {
    "suffix": _suffix,
    "sliding": _sliding,
    "entropy_bound": _entropy_bound,
    "skip": _skip,
    "rollout": _rollout,
}
# Those whose code ends a row behind a block with an end token.
BLOCK_ENDS = ("suffix",)


def _computed(engine: Engine, result: StepResult) -> Tensor:
    return engine.rows.to_caller(result.plan.active)


# By the name of a recorded tensor [T, ..., B, L], what a step has in its place: bool [..., B, L].
SETS: dict[str, Callable[[Engine, StepResult], Tensor]] = {
    "computed": _computed,
    "visible": visible,
    "entering": entering,
}
# Tensors of a run that are no sets.
TOKENS = ("prompt", "x_steps", "final")


def settings_of(case: Case) -> Facts:
    """The settings of `dkv.generate` that stand for those of a recorded run.

    Raises:
        ValueError: no policy of that name is known here, or a fact is missing.
    """
    f, policy = case.facts, case.facts["policy"]
    if policy not in SETTINGS:
        raise ValueError(f"no policy {policy!r} is known here: known are {', '.join(SETTINGS)}")
    try:
        own = SETTINGS[policy](f)
        given = {name: f[name] for name in ("gen_length", "block_length")}
        return {"schedule": "blocks", **given, "mask_id": f["mask_id"], "threshold": f.get("threshold"), **own}
    except KeyError as missing:
        raise ValueError(f"the recorded run says nothing of {missing}") from missing


def check_policy(case: Case, model: Any) -> str:
    """Replay a run of one row, and compare after every pass its tokens and all sets that were recorded.

    Returns:
        What was compared, in words.

    Raises:
        Mismatch: what differs, where, and the two values.
        ValueError: the record is not whole.
    """
    settings, t = settings_of(case), case.tensors
    sets = _checked_sets(t)
    steps: list[dict[str, Tensor]] = []

    def watch(engine: Engine, result: StepResult) -> None:
        steps.append({"token": engine.sequences, **{name: SETS[name](engine, result) for name in sets}})

    ending = BlockEnd(case.facts["eos_id"], model.device) if case.facts["policy"] in BLOCK_ENDS else None
    output = replay(model, t["prompt"].long(), on_step=watch, ending=ending, **settings)
    recorded = {"token": t["x_steps"].long(), **{name: t[name].bool() for name in sets}}
    for step, found in enumerate(steps[: len(t["x_steps"])]):
        for name, expected in recorded.items():
            compare(name, found[name], expected[step], step)
    if len(steps) != len(t["x_steps"]):
        raise Mismatch(f"{counted(len(steps), 'pass')}, recorded {len(t['x_steps'])}")
    compare("final token", output.sequences, t["final"].long(), len(steps) - 1)
    return f"{counted(len(steps), 'pass')}, {output.stats.computed_share:.0%} of the slots computed"


def _checked_sets(t: dict[str, Tensor]) -> list[str]:
    """The names of the recorded sets; ValueError where tensors are missing, not known here, or do not fit."""
    if missing := [name for name in TOKENS if name not in t]:
        raise ValueError(f"the recorded run has no tensor {', '.join(missing)}")
    sets = [name for name in t if name not in TOKENS]
    if unknown := [name for name in sets if name not in SETS]:
        raise ValueError(f"no set {unknown[0]!r} is known here: known are {', '.join(SETS)}")
    if not sets:
        raise ValueError(f"the recorded run has no set of slots: one of {', '.join(SETS)}")
    passes, wide = len(t["x_steps"]), t["x_steps"].shape[1:]
    for name in ("x_steps", *sets):
        if len(t[name]) != passes or t[name].shape[-2:] != wide:
            raise ValueError(f"{name} {list(t[name].shape)} does not fit x_steps {list(t['x_steps'].shape)}")
    return sets
