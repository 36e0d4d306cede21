"""Names, aliases and values of `DiffusionConfig`."""

import time
from dataclasses import fields

import numpy as np
import pytest
import torch

import dkv
from dkv import DiffusionConfig
from dkv.engine.settings import SETTINGS
from dkv.policies import POLICIES, policy_of


def of_kind(*kinds):
    return [name for name, setting in SETTINGS.items() if setting.kind in kinds]


def test_names_of_both_families_are_accepted():
    llada = DiffusionConfig(
        gen_length=32, steps=16, block_length=8, remasking="low_confidence", mask_id=5, cfg_scale=0.0
    )
    assert (llada.max_new_tokens, llada.confidence, llada.mask_token_id) == (32, "probability", 5)
    names = {"origin": "random", "maskgit_plus": "probability", "topk_margin": "margin", "entropy": "entropy"}
    for alg, rule in names.items():
        heat = 0.0 if alg == "origin" else 0.5
        dream = DiffusionConfig(max_new_tokens=8, alg=alg, alg_temp=heat, eps=1e-3, return_dict_in_generate=True)
        assert (dream.confidence, dream.selection_temperature) == (rule, heat)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tempreature": 1.0}, "unknown setting 'tempreature'; did you mean 'temperature'"),
        ({"num_beams": 4}, "num_beams can only be 1 here, got 4: a canvas has no beams"),
        ({"num_return_sequences": 2}, "num_return_sequences can only be 1"),
        ({"cfg_scale": -1}, "cfg_scale must be between 0"),
        ({"threshold": 1.5}, "threshold must be between 0 and 1 with confidence='probability', got 1.5"),
        ({"threshold": 0.5, "confidence": "entropy"}, "threshold must be between -inf and 0 with confidence='entropy'"),
        ({"threshold_decay": 0.4}, "threshold_decay=0.4 is a part of threshold, and acts on nothing without it"),
        (
            {"threshold_decay": 0.4, "factor": 1.0},
            "threshold_decay=0.4 is a part of threshold, and acts on nothing without it",
        ),
        ({"threshold": 0.9, "threshold_decay": 1.5}, "threshold_decay must be between 0 and 1, got 1.5"),
        ({"threshold": 0.9, "factor": 1.0}, "threshold and factor are two rules for the same thing"),
        ({"threshold": 0.9, "confidence": "random"}, "threshold needs a confidence to go by"),
        ({"factor": 1.0, "confidence": "entropy"}, "factor needs a confidence to go by"),
        ({"threshold": 0.9, "alg_temp": 0.5}, "selection_temperature draws them"),
        ({"factor": -1.0}, "factor must be between 0"),
        ({"entropy_bound": -0.1}, "entropy_bound must be between 0"),
        ({"entropy_bound": 0.1, "entropy_form": "sum"}, "entropy_form must be one of paper, code"),
        ({"entropy_form": "code"}, "entropy_form='code' is a part of entropy_bound, and acts on nothing without it"),
        ({"entropy_bound": 0.1, "factor": 1.0}, "factor and entropy_bound are two rules for the same thing"),
        ({"entropy_bound": 0.1, "confidence": "random"}, "entropy_bound needs a confidence to go by"),
        ({"entropy_bound": 0.1, "alg_temp": 0.5}, "entropy_bound fills the surest slots, selection_temperature draws"),
        ({"near_threshold": 0.7}, "near_threshold=0.7 is a part of threshold, and acts on nothing without it"),
        ({"threshold": 0.9, "radius": 2}, "radius=2 is a part of near_threshold, and acts on nothing"),
        ({"threshold": 0.5, "near_threshold": 0.7}, r"near_threshold, .* must be at most threshold \(0.5\), got 0.7"),
        ({"threshold": 0.5, "near_threshold": -1}, "near_threshold must be between 0 and 1"),
        ({"threshold": 0.5, "near_threshold": 0.4, "radius": -1}, "radius must be a whole number of at least 0"),
        ({"threshold": "0.9"}, "threshold must be between 0 and 1"),
        ({"temperature": "hot"}, "temperature must be between 0 and 1000000, got 'hot'"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": [1, None]}, "seed must be a whole number, or a list of them, got"),
        ({"mask_token_id": 1.5}, "mask_token_id must be a whole number of at least 0, got 1.5"),
        ({"vocab_limit": 0}, "vocab_limit must be a whole number of at least 1, got 0"),
        ({"eos_token_id": [1, -2]}, "eos_token_id must be a whole number of at least 0, or a list of them"),
        ({"max_new_tokens": [3, 0.5]}, "max_new_tokens must be a whole number of at least 0, or a list of them"),
        ({"max_new_tokens": [8, 40], "block_length": 8, "steps": 4}, "40 new tokens in blocks of 8 need 5"),
        (
            {"max_new_tokens": [8, 9], "seed": [1, 2, 3]},
            "got 2 of max_new_tokens, 3 of seed",
        ),
        ({"gen_length": 8, "max_new_tokens": 9}, "contradicts"),
        ({"remasking": "high_confidence"}, "confidence must be one of"),
        ({"temperature": -1}, "temperature must be between"),
        ({"temperature": float("nan")}, "temperature must be between"),
        ({"top_p": 1.5}, "top_p must be between"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens must be"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be"),
        ({"max_new_tokens": True}, "max_new_tokens must be"),
        ({"steps": 0}, "steps must be"),
        ({"block_length": 0}, "block_length must be"),
        ({"max_new_tokens": 64, "block_length": 8, "steps": 4}, "at least the number of blocks"),
        ({"schedule": "cosine"}, "schedule must be"),
        ({"schedule": "time", "block_length": 8}, "block_length goes with"),
        ({"cache": "delta"}, "unknown policy 'delta'; known are none, decode"),
        ({"cache": {"name": "decode", "window": 4}}, "policy 'decode' has no window; it takes"),
        ({"cache": 8}, "cache must be a policy"),
    ],
    ids=str,
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**settings)


def test_a_refused_update_leaves_all_as_it_was():
    config = DiffusionConfig(threshold=0.5)
    for bad in ({"threshold": 7}, {"steps": 3, "cache": "no"}, {"max_new_tokens": 9, "block_length": 2, "steps": 1}):
        with pytest.raises(ValueError, match=r"must be|unknown"):
            config.update(**bad)
        assert (config.threshold, config.steps, config.max_new_tokens, config.block_length) == (0.5, None, 128, None)
    config.update(seed=np.int64(3), alg_temp=None)
    assert (config.seed, config.selection_temperature) == (3, 0.0)


def test_update_refuses_what_the_constructor_refuses():
    config = DiffusionConfig()
    config.update(gen_length=4, cache="greedy")
    assert config.max_new_tokens == 4 and config.cache == dkv.GreedyCache()
    with pytest.raises(ValueError, match="unknown setting"):
        config.update(blocklength=4)


@pytest.mark.parametrize("name", ["none", "decode", "greedy", "prefill", "pd"])
def test_policies_by_name(name):
    assert policy_of(name).name == name


def test_saved_and_loaded_again(tmp_path):
    config = DiffusionConfig(
        max_new_tokens=64, block_length=32, temperature=0.5, cache=dkv.DecodeCache(4, shift_rule="un_right"), seed=7,
        eos_token_id=3,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    again = DiffusionConfig.from_pretrained(tmp_path)
    assert again.to_dict()["cache"] == config.to_dict()["cache"] and again.cache == config.cache
    for name in ("max_new_tokens", "block_length", "temperature", "seed", "eos_token_id", "steps"):
        assert getattr(again, name) == getattr(config, name)


def test_policies_refuse_impossible_values():
    for make, message in [
        (lambda: dkv.DecodeCache(-1), "refresh must be"),
        (lambda: dkv.DecodeCache(2.5), "refresh must be"),
        (lambda: dkv.DecodeCache(4, warmup=0), "warmup must be"),
        (lambda: dkv.DecodeCache(4, shift_rule="left"), "shift_rule must be"),
        (lambda: dkv.GreedyCache(2, window=-1), "window must be"),
        (lambda: dkv.GreedyCache(2, window=None), "window must be"),
        (lambda: dkv.DecodeCache("8"), "refresh must be"),
        (lambda: dkv.PrefixCache(delayed=1), "delayed must be True or False"),
        (lambda: dkv.GreedyCache(2, window_center="first"), "window_center must be"),
        (lambda: dkv.SuffixWindow(window=-1), "window must be"),
        (lambda: dkv.SuffixWindow(tail=None), "tail must be"),
        (lambda: dkv.SuffixWindow(base="decode"), 'base must be "prefix" or "dual", got \'decode\''),
        (lambda: dkv.SuffixWindow(base=[]), "base must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


ABSURD = [float("inf"), float("-inf"), float("nan"), 10**30, -(10**30), 10**400, "8", True, 1j, object(), [[1]], {}]


@pytest.mark.parametrize("name", [*of_kind("whole", "number"), "threshold"])
def test_absurd_numbers_are_refused(name):
    for value in (*ABSURD, torch.tensor(float("nan")), np.float64("inf"), torch.tensor(True)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            DiffusionConfig(**{name: value})
    if name not in ("eos_token_id", "eot_token_id"):  # which may have no ids
        with pytest.raises(ValueError, match=f"{name} (must be|is an empty list)"):
            DiffusionConfig(**{name: []})
    with pytest.raises(ValueError, match="threshold must be between -inf and 0"):
        DiffusionConfig(confidence="entropy", threshold=float("-inf"))


OTHER_KINDS = ("shift_rule", "window_center", "delayed", "base", "shares")
NUMBERS = [(p, f.name, f.default) for p in POLICIES.values() for f in fields(p) if f.name not in OTHER_KINDS]


@pytest.mark.parametrize(("policy", "name", "default"), NUMBERS, ids=lambda x: getattr(x, "name", x))
def test_absurd_numbers_of_policies_are_refused(policy, name, default):
    for value in ABSURD:
        with pytest.raises(ValueError, match=f"{name} must be"):
            policy(**{name: value})
        with pytest.raises(ValueError, match=f"{name} must be"):
            DiffusionConfig(cache={"name": policy.name, name: value})
    kind, value = (float, np.float32(0.5)) if isinstance(default, float) else (int, np.int64(3))
    assert type(getattr(policy(**{name: value}), name)) is kind
    assert type(getattr(policy(**{name: torch.tensor(value)}), name)) is kind


def test_scalars_of_numpy_and_torch_are_numbers():
    for make in (np.float32, torch.tensor, np.array):
        config = DiffusionConfig(temperature=make(0.5), threshold=make(0.25))
        assert (config.temperature, config.threshold, type(config.temperature)) == (0.5, 0.25, float)
    config = DiffusionConfig(
        max_new_tokens=[np.int64(3), torch.tensor(4)], seed=torch.tensor([1, 2]), steps=(np.int8(3), 4),
        output_history=np.bool_(True), top_k=torch.tensor(3),
    )  # fmt: skip
    assert (config.max_new_tokens, config.seed, config.steps) == ([3, 4], [1, 2], [3, 4])
    assert config.output_history is True and type(config.top_k) is int


@pytest.mark.parametrize("name", of_kind("flag"))
def test_switches_are_true_or_false(name):
    for value in (1, 0, "yes", [True], torch.ones(2)):
        with pytest.raises(ValueError, match=f"{name} must be True or False"):
            DiffusionConfig(**{name: value})


@pytest.mark.parametrize(
    "settings",
    [{"cache": {"name": []}}, {"cache": dkv.DecodeCache}, {"schedule": ["time"]}, {"remasking": ["random"]}],
    ids=str,
)
def test_odd_kinds_are_refused(settings):
    with pytest.raises(ValueError, match=r"must be|unknown policy"):
        DiffusionConfig(**settings)


def test_no_plan_is_made_to_check_settings():
    """As long as these would be, none could be made in time."""
    begun = time.perf_counter()
    for settings in ({"max_new_tokens": 2**31 - 1}, {"max_new_tokens": 2**31 - 1, "block_length": 1},
                     {"max_new_tokens": 2**31 - 1, "schedule": "time"}, {"steps": 2**31 - 1}):  # fmt: skip
        DiffusionConfig(**settings)
    assert len(DiffusionConfig(max_new_tokens=4, steps=2**31 - 1).plan(shifted=False)) == 4
    config = DiffusionConfig(max_new_tokens=4, steps=10**8)
    with pytest.raises(ValueError, match="steps must be at most 65536 in the time schedule"):
        config.plan(shifted=True)
    with pytest.raises(ValueError, match="steps must be at most 65536"):
        config.update(schedule="time")
    assert time.perf_counter() - begun < 30
