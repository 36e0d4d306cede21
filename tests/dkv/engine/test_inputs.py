"""Impossible inputs: named, before any work."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dkv

IDS = torch.tensor([[5, 9, 3], [1, 2, 3]])


@pytest.mark.parametrize(
    ("ids", "mask", "settings", "error", "message"),
    [
        (IDS[0], None, {}, ValueError, r"input_ids must have shape \[any, any\], got \[3\]"),
        (IDS.float(), None, {}, ValueError, "input_ids must be int32, int64"),
        ([[1, 2]], None, {}, ValueError, "input_ids must be a tensor"),
        (IDS[:0], None, {}, ValueError, "input_ids holds no rows"),
        (IDS.to("meta"), None, {}, ValueError, "input_ids is on meta but the model is on cpu"),
        (IDS + 60, None, {}, IndexError, r"input_ids must be in 0\.\.63, the model's vocabulary, got 69"),
        (-IDS, None, {}, IndexError, "got -9"),
        (IDS, torch.ones(2, 4), {}, ValueError, r"attention_mask must have shape \[2, 3\], got \[2, 4\]"),
        (IDS, torch.full((2, 3), 2), {}, ValueError, "attention_mask must hold 1 at real tokens and 0"),
        (IDS, torch.ones(2, 3, device="meta"), {}, ValueError, "attention_mask is on meta but input_ids is on cpu"),
        (IDS, None, {"max_new_tokens": 254}, ValueError, r"3 tokens and max_new_tokens \(254\) need 257 .* 256"),
        (IDS, None, {"mask_token_id": 64}, ValueError, "mask_token_id must be at most 63"),
        (IDS, None, {"vocab_limit": 65}, ValueError, "vocab_limit must be at most 64"),
        (IDS, None, {"max_new_tokens": 10**9}, ValueError, "need 1000000003 positions, the model has 256"),
        (IDS, None, {"max_new_tokens": [4, 10**9]}, ValueError, "need 1000000003 positions"),
        (IDS, None, {"schedule": "time", "steps": 10**8}, ValueError, "steps must be at most 65536"),
        (IDS, None, {"max_new_tokens": [4] * 3}, ValueError, "max_new_tokens is a list of 3, but input_ids has 2 rows"),
        (IDS, None, {"seed": 2**64}, ValueError, "seed must be at most 18446744073709551615"),
        (IDS, None, {"seed": -(2**63) - 1}, ValueError, "seed must be a whole number of at least -9223372036854775808"),
        (IDS, None, {"gen_lenght": 8}, ValueError, "did you mean 'gen_length'"),
    ],
)  # fmt: skip
def test_impossible_inputs_are_named(llada, ids, mask, settings, error, message):
    with pytest.raises(error, match=message):
        dkv.generate(llada, ids, mask, **settings)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match=r"model must come from dkv\.load\(path\) or dkv\.wrap\(hf_model\), got Linear"):
        dkv.generate(torch.nn.Linear(2, 2), IDS)


def test_int32_ids_and_bool_masks_are_fine(llada):
    expected = dkv.generate(llada, IDS, max_new_tokens=2).sequences
    mask = torch.ones_like(IDS, dtype=torch.bool)
    assert torch.equal(dkv.generate(llada, IDS.int(), mask, max_new_tokens=2).sequences, expected)


@pytest.mark.parametrize("cache", ["none", "decode", "greedy"])
def test_nan_in_the_logits_is_an_error(build, cache):
    model = build()
    model.layers[0].up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="logits hold NaN or infinity"):
        dkv.generate(model, IDS, max_new_tokens=4, cache=cache)


READ_BACK = ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "equal")


class Watch(TorchDispatchMode):
    """Names of operations that read values back to the host, boolean indexing included."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READ_BACK:
            self.seen.append(name)
        if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)):
            self.seen += [f"{name} by bool" for i in args[1] if i is not None and i.dtype == torch.bool]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"threshold": 0.3},
        {"factor": 0.9},
        {"entropy_bound": 4.0},
        {"threshold": 0.3, "near_threshold": 0.25, "radius": 1},
        {"eos_token_id": 61},
        {"confidence": "random"},
        {"temperature": 0.8, "top_k": 9},
        {"max_new_tokens": [6, 3]},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "cache", [dkv.NoCache(), dkv.DecodeCache(3), dkv.PrefillCache(), dkv.DualCache(delayed=True)], ids=str
)
def test_a_step_reads_one_status_and_nothing_else(model, padded, cache, settings):
    """In every setting that needs no Python of the caller, rows of different lengths included."""
    from dkv.engine.engine import Engine

    step, tolist, reads, steps = Engine.step, torch.Tensor.tolist, [], []

    def watched(self):
        reads.clear()
        with Watch() as watch:
            step(self)
        steps.append((len(reads), watch.seen))

    def noted(x):
        # The operations of a CPU walk through rows of different lengths one by one; the kernels do not.
        if sys._getframe(1).f_globals["__name__"].startswith("dkv.engine"):
            reads.append(x.shape)
        return tolist(x)

    ids, mask = padded([[5, 9], [7, 3, 20, 41, 2]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", watched)
        patch.setattr(torch.Tensor, "tolist", noted)
        dkv.generate(model, ids, mask, cache=cache, seed=1, **{"max_new_tokens": 6, **settings})
    assert len(steps) >= 2 and set(map(str, steps)) == {"(1, [])"}


def test_the_watch_sees_what_it_looks_for():
    x = torch.arange(3)
    with Watch() as watch:
        _ = x[x > 1], int(x[0]), x.nonzero()
        x[x > 1] = 0
    assert {"_local_scalar_dense", "nonzero", "index by bool", "index_put_ by bool"} <= set(watch.seen)


def test_the_largest_numbers_give_tokens(model):
    """What is accepted works, and at once."""
    most, call = 2**31 - 1, {"max_new_tokens": 6, "schedule": "blocks"}
    plain = dkv.generate(model, IDS, **call).sequences
    for settings in (
        {"steps": most}, {"block_length": most}, {"top_k": most}, {"cfg_scale": 1e-30},
        {"cache": dkv.DecodeCache(most, most)}, {"cache": dkv.GreedyCache(1, most)},
    ):  # fmt: skip
        assert torch.equal(dkv.generate(model, IDS, **call, **settings).sequences, plain), settings
    for settings in (
        {"temperature": 1e6}, {"temperature": 1e-30}, {"alg_temp": 1e6}, {"alg_temp": 1e-30}, {"cfg_scale": 1e6},
        {"temperature": 1.0, "top_p": 1e-300}, {"temperature": 1.0, "seed": 2**64 - 1}, {"factor": 1e6},
        {"schedule": "time", "eps": 1e-300}, {"cache": dkv.GreedyCache(most, most)},
    ):  # fmt: skip
        assert not (dkv.generate(model, IDS, **{**call, **settings}).sequences == 63).any()
