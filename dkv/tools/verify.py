"""Replay recorded runs of the published code through the public API, and compare.

A golden folder holds `config.json`, `model.safetensors` and `cases/NAME.json` + `.safetensors`;
`tests/golden/README.md` describes the tensors. Of the runs of dKV-Cache, tokens after every step and the slots
computed in every step must be equal, logits within `LOGIT_TOLERANCE`; of those of Fast-dLLM, the tokens and how
many slots every pass computed. Runs of newer policies are replayed by `dkv.tools.verify_policies`, those of
block-causal models and their kin by `dkv.tools.verify_families`, and those of DiffusionGemma by
`dkv.tools.verify_gemma`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dkv
from dkv.common.bar import counted
from dkv.engine.replay import Numbers, replay
from dkv.models.gemma import Gemma
from dkv.tools.recorded import Case, Mismatch, compare, find_cases
from dkv.tools.verify_families import check_family, is_family
from dkv.tools.verify_gemma import check_gemma
from dkv.tools.verify_policies import check_policy

LOGIT_TOLERANCE = 1e-4


def llada_settings(case: Case) -> dict[str, Any]:
    """The settings of `dkv.generate` that stand for those of a LLaDA run."""
    s, cache = case.settings, dkv.NoCache()
    if s["enable_cache"]:
        refresh, greedy = s["cache_reloading_step"], case.facts["variant"] == "greedy"
        cache = dkv.GreedyCache(refresh, s["window_size"]) if greedy else dkv.DecodeCache(refresh)
    names = ("gen_length", "steps", "block_length", "remasking", "temperature", "mask_id")
    return {"cache": cache, "schedule": "blocks", **{name: s[name] for name in names}}


def dream_settings(case: Case) -> dict[str, Any]:
    """The settings of `dkv.generate` that stand for those of a Dream run."""
    names = ("max_new_tokens", "steps", "eps", "alg", "alg_temp", "temperature", "top_p", "top_k", "mask_id")
    caches = ("use_cache", "cache_type", "cache_steps", "shift_type")
    return {"schedule": "time", **{name: case.settings[name] for name in (*names, *caches)}}


def recorded_numbers(tensors: dict[str, Tensor]) -> Numbers | None:
    """The random numbers of a run, by step; None if it used none."""
    if "denoise_rand" in tensors:
        block = tensors["step_block"].tolist()
        return lambda step, shape: tensors["denoise_rand"][block[step]]
    if "rand_scores" in tensors:
        return lambda step, shape: tensors["rand_scores"][step]
    return None


def check_case(case: Case, model: Any) -> str:
    """Replay a case.

    Returns:
        What was compared, in words.

    Raises:
        Mismatch: what differs, where, and the two values.
    """
    if is_family(case):
        return (check_gemma if isinstance(model, Gemma) else check_family)(case, model)
    if "policy" in case.facts:
        return check_policy(case, model)
    if "function" in case.facts:
        return _check_blocks(case, model)
    if case.facts["variant"] == "forward":
        return _check_forward(case.tensors, model)
    t = case.tensors
    settings = {"llada": llada_settings, "dream": dream_settings}[case.facts["family"]](case)
    call = (model, t["prompt"].long(), t.get("attention_mask"), recorded_numbers(t))
    settings |= {"output_history": True, "output_active": True}
    # Once as users run it, and once more with every logit, which takes other paths through the model.
    fast, full = replay(*call, **settings), replay(*call, **settings, output_logits=True)
    for output in (fast, full):
        _check_tokens(t, output)
        _check_active(t, output)
    worst = _check_logits(t, full)
    share = fast.stats.computed_share
    return f"{counted(len(fast.history), 'step')}, {share:.0%} of the slots computed, logits within {worst:.1e}"


# The policies that stand for the functions of Fast-dLLM.
FAST_DLLM = {
    "generate": dkv.NoCache(),
    "generate_with_prefix_cache": dkv.PrefixCache(),
    "generate_with_dual_cache": dkv.DualCache(),
}


def _check_blocks(case: Case, model: Any) -> str:
    """A run of Fast-dLLM, whose code does not look at the number of steps where it has a threshold."""
    f, t = case.facts, case.tensors
    rule = "steps" if f["threshold"] is None else "threshold"
    settings = {name: f[name] for name in ("gen_length", "block_length", rule)}
    settings |= {"cache": FAST_DLLM[f["function"]], "schedule": "blocks", "output_active": True}
    output = dkv.generate(model, t["prompt"].long(), **settings)
    _check_final(t, output)
    computed, recorded = output.active.sum((1, 2)).tolist(), t["call_lengths"].tolist()
    needed: list[int] = []
    for before, slots in zip([0, *recorded], recorded, strict=False):
        # After a full pass that filled its block, the published code makes one pass more. It changes nothing.
        if before == recorded[0] and computed[len(needed) : len(needed) + 1] != [slots]:
            continue
        needed.append(slots)
    if computed != needed:
        raise Mismatch(f"the passes computed {computed} slots, recorded {recorded}")
    return f"{counted(len(computed), 'pass')}, {output.stats.computed_share:.0%} of the slots computed"


def _check_tokens(t: dict[str, Tensor], output: dkv.DiffusionOutput) -> None:
    for step, expected in enumerate(t["x_steps"].long()):
        # dkv makes no pass once every slot has its token.
        compare("token", output.history[min(step, len(output.history) - 1)], expected, step)
    _check_final(t, output)


def _check_final(t: dict[str, Tensor], output: dkv.DiffusionOutput) -> None:
    if not torch.equal(output.sequences, t["final"].long()):
        raise Mismatch("the final sequences differ from the recorded ones")


def _active(t: dict[str, Tensor]) -> Tensor:
    """bool [steps, B, L]: the recorded active slots, without padding."""
    active = t["active"].bool()
    if "attention_mask" in t:
        active[:, :, : t["attention_mask"].shape[1]] &= t["attention_mask"].bool()
    return active


def _check_active(t: dict[str, Tensor], output: dkv.DiffusionOutput) -> None:
    for step, (found, expected) in enumerate(zip(output.active, _active(t), strict=False)):
        if not torch.equal(found, expected):
            extra, missing = (found & ~expected).nonzero().tolist(), (expected & ~found).nonzero().tolist()
            raise Mismatch(f"step {step}: computed but not recorded {extra}, recorded but not computed {missing}")


def _check_logits(t: dict[str, Tensor], output: dkv.DiffusionOutput) -> float:
    """The largest difference from any recorded logit, maximum or log-sum-exp."""
    worst, columns = 0.0, t["logit_cols"].long()
    for step, (logits, here) in enumerate(zip(output.logits, _active(t), strict=False)):
        best = logits.amax(-1)
        # Two tokens may be equally good: which one is the larger by a bit depends on the processor.
        recorded = logits[here].gather(-1, t["argmax"][step].long()[here][:, None]).squeeze(-1)
        if (best[here] - recorded > LOGIT_TOLERANCE).any():
            raise Mismatch(f"step {step}: another best token than recorded at an active slot")
        pairs = [(best[here], t["maxlogit"][step][here]), (logits.logsumexp(-1)[here], t["lse"][step][here])]
        if (raw := t.get(f"logits_step{step:03d}")) is not None:
            active = t["active"][step].bool()
            wide = torch.zeros(*active.shape, len(columns))
            wide[active] = raw.flatten(0, 1)
            pairs.append((logits[..., columns][here], wide[here]))
        worst = max(worst, *((found - expected).abs().max().item() for found, expected in pairs))
        if not worst <= LOGIT_TOLERANCE:
            raise Mismatch(f"step {step}: logits differ by {worst:.2e}, more than {LOGIT_TOLERANCE}")
    return worst


@torch.no_grad()
def _check_forward(t: dict[str, Tensor], model: Any) -> str:
    mask = t.get("attention_mask")
    real = torch.ones_like(t["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    hidden: list[Tensor] = []

    def keep(layer: Any, args: tuple) -> None:
        x, delta = args[:2]
        hidden.append(x.clone() if delta is None else x + delta)

    hooks = [layer.register_forward_pre_hook(keep) for layer in model.layers]
    hooks.append(model.norm.register_forward_hook(lambda m, args, out: hidden.append(out.clone())))
    try:
        logits = model(t["input_ids"].long(), mask)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = [("logits", logits), *((f"hidden_{i}", h) for i, h in enumerate(hidden))]
    worst = max((found - t[name]).abs()[real].max().item() for name, found in pairs)
    if not worst <= LOGIT_TOLERANCE:
        raise Mismatch(f"logits or hidden states differ by {worst:.2e}, more than {LOGIT_TOLERANCE}")
    return f"one forward pass, logits and hidden states within {worst:.1e}"


def verify(folders: list[Path]) -> Iterator[tuple[Case, str, str]]:
    """Replay every case; yields (case, "PASS" | "FAIL" | "SKIP", what was found).

    A case that raises counts as failed, whatever the reason, and the others still run.

    Raises:
        FileNotFoundError: a folder holds no recorded runs.
    """
    models: dict[Path, Any] = {}
    for case in [case for folder in folders for case in find_cases(folder)]:
        if case.defect:
            yield case, "SKIP", case.defect
            continue
        try:
            if case.folder not in models:
                models = {case.folder: dkv.load(case.folder, device="cpu")}
            yield case, "PASS", check_case(case, models[case.folder])
        except Exception as error:
            yield case, "FAIL", f"{type(error).__name__}: {error}"
