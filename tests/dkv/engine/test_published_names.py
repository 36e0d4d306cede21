"""Settings of transformers and of the published generate functions: they act, change nothing, or are refused."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import dkv
from dkv import DiffusionConfig
from dkv.engine.published_names import BOOKKEEPING, CONFIDENCES, NO_EFFECT, OTHERS
from dkv.engine.settings import DEFAULTS

IDS = torch.tensor([[5, 9, 3], [1, 2, 3]])


def test_every_name_of_transformers_has_an_answer():
    """A value that is not the default acts on a setting of ours, or is refused."""
    acting = {"do_sample", "use_cache"}
    for name in vars(GenerationConfig()):
        assert name in {*DEFAULTS, *BOOKKEEPING, *NO_EFFECT, *OTHERS, *acting}, name
        DiffusionConfig(**{name: None})
        if name in OTHERS:
            with pytest.raises(ValueError, match=f"{name} (can only be|is not a setting here).*: .{{10}}"):
                DiffusionConfig(**{name: 77})


def test_unset_settings_of_transformers_are_taken():
    unset = {name: value for name, value in vars(GenerationConfig()).items() if value is None}
    assert DiffusionConfig.from_dict(unset).settings() == DiffusionConfig().settings()
    assert DiffusionConfig(max_new_tokens=None, eps=None, gen_length=7).max_new_tokens == 7
    for name, (neutral, _) in OTHERS.items():
        for value in neutral:
            assert DiffusionConfig(**{name: value}).settings() == DiffusionConfig().settings(), name


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": None}, 1.0),
        ({"do_sample": True, "temperature": 0.3}, 0.3),
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0}, 0.0),
        ({"do_sample": None, "temperature": 0.3}, 0.3),
        ({"do_sample": np.bool_(True)}, 1.0),
        ({"do_sample": True, "temperature": 0}, None),
        ({"do_sample": False, "temperature": 1.0}, None),
        ({"do_sample": "yes"}, None),
        ({"do_sample": 1}, None),
    ],
    ids=str,
)
def test_do_sample_says_whether_tokens_are_drawn(settings, temperature):
    if temperature is None:
        with pytest.raises(ValueError, match="do_sample"):
            DiffusionConfig(**settings)
        return
    assert DiffusionConfig(**settings).temperature == temperature


def test_an_override_draws_or_does_not(llada):
    call = {"max_new_tokens": 6, "seed": 3}
    greedy, drawn = dkv.generate(llada, IDS, **call), dkv.generate(llada, IDS, **call, temperature=1.0)
    assert not torch.equal(greedy.sequences, drawn.sequences)
    assert torch.equal(dkv.generate(llada, IDS, **call, do_sample=True).sequences, drawn.sequences)
    hot = DiffusionConfig(**call, temperature=1.0)
    assert torch.equal(dkv.generate(llada, IDS, generation_config=hot).sequences, drawn.sequences)
    cold = dkv.generate(llada, IDS, generation_config=hot, do_sample=False)
    assert torch.equal(cold.sequences, greedy.sequences) and hot.temperature == 1.0
    nearly = dkv.generate(llada, IDS, **call, temperature=1e-30)
    assert torch.equal(nearly.sequences, greedy.sequences)


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({"enable_cache": True, "cache_reloading_step": 8}, dkv.DecodeCache(8)),
        ({"enable_cache": True}, dkv.DecodeCache(1)),
        ({"enable_cache": True, "cache_reloading_step": 2, "window_size": 4}, dkv.GreedyCache(2, 4)),
        ({"enable_cache": True, "window_size": 1}, dkv.GreedyCache(1, 1)),
        ({"enable_cache": False, "cache_reloading_step": 2, "window_size": 4}, dkv.NoCache()),
        ({"use_cache": True, "cache_type": "decoded", "cache_steps": 4, "shift_type": "un"}, dkv.DecodeCache(4)),
        ({"use_cache": True, "cache_type": "decoded", "cache_steps": 0}, dkv.DecodeCache(0)),
        ({"use_cache": True, "cache_type": "pd", "cache_steps": 4, "shift_type": "un_right"},
         dkv.PrefillDecodeCache(4, shift_rule="un_right")),
        ({"use_cache": True, "cache_type": "prefill", "cache_steps": 0, "shift_type": "un"}, dkv.PrefillCache()),
        ({"use_cache": False, "cache_type": "pd", "cache_steps": 0, "shift_type": "un"}, dkv.NoCache()),
        ({"use_cache": True, "dual_cache": False}, dkv.PrefixCache()),
        ({"use_cache": True, "dual_cache": True}, dkv.DualCache()),
        ({"dual_cache": True}, dkv.DualCache()),
        ({"dual_cache": False}, dkv.NoCache()),
        ({"use_cache": False, "dual_cache": True}, dkv.NoCache()),
        ({"use_cache": True, "cache": "greedy"}, dkv.GreedyCache()),
        ({"use_cache": False, "cache": "none"}, dkv.NoCache()),
        ({"use_cache": None, "cache_type": None}, dkv.NoCache()),
    ],
    ids=str,
)  # fmt: skip
def test_published_caches(settings, policy):
    assert DiffusionConfig(**settings).cache == policy
    config = DiffusionConfig(cache="decode" if policy == dkv.NoCache() and "cache" not in settings else None)
    config.update(**settings)
    if any(value is not None for value in settings.values()):
        assert config.cache == policy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_cache": True}, "cache_type='decoded', 'prefill' or 'pd' .* dual_cache=False or True"),
        ({"use_cache": True, "cache_steps": 4}, "does not say which cache"),
        ({"use_cache": True, "cache": "none"}, "use_cache=True does not go with cache='none'"),
        ({"use_cache": False, "cache": dkv.DecodeCache(8)}, "use_cache=False does not go with cache=Decode"),
        ({"cache_steps": 4, "cache": "decode"}, "cache_steps=4 does not go with cache='decode'"),
        ({"cache_steps": 4}, "cache_steps goes with enable_cache=True or use_cache=True"),
        ({"cache_type": "decoded"}, "cache_type goes with"),
        ({"window_size": 4}, "window_size goes with"),
        ({"enable_cache": True, "cache_reloading_step": 2, "window_size": 0}, "window_size=0 does not say which cache"),
        ({"use_cache": True, "enable_cache": False}, "contradict each other"),
        ({"use_cache": True, "cache_type": "decode"}, "cache_type must be one of decoded, prefill, pd"),
        ({"use_cache": True, "cache_type": ["pd"]}, "cache_type must be one of"),
        ({"use_cache": True, "cache_type": "pd", "dual_cache": True}, "of different caches"),
        ({"use_cache": True, "cache_type": "pd", "window_size": 3}, "of different caches"),
        ({"use_cache": True, "cache_type": "prefill", "cache_steps": 4}, "'prefill' cache, which has no refresh"),
        ({"use_cache": True, "dual_cache": True, "shift_type": "un"}, "which has no shift_rule"),
        ({"enable_cache": True, "cache_steps": 8, "cache_reloading_step": 4}, "contradicts"),
        ({"enable_cache": True, "cache_reloading_step": "8"}, "refresh must be a whole number"),
        ({"use_cache": "yes"}, "use_cache must be True or False"),
        ({"use_cache": 1, "dual_cache": True}, "use_cache must be True or False"),
    ],
    ids=str,
)
def test_caches_that_are_not_said_clearly_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**settings)


def test_a_policy_may_be_kept_on_and_put_off(llada):
    config = DiffusionConfig(cache="decode", max_new_tokens=4)
    assert (
        dkv.generate(llada, IDS, generation_config=config, use_cache=True).stats.settings["cache"]["name"] == "decode"
    )
    assert dkv.generate(llada, IDS, generation_config=config, use_cache=False).stats.settings["cache"]["name"] == "none"


def test_the_three_names_of_the_confidence_take_all_its_values():
    for name in ("confidence", "remasking", "alg"):
        for value, rule in CONFIDENCES.items():
            assert DiffusionConfig(**{name: value}, threshold=0.9 if "threshold" in value else None).confidence == rule
    assert {"low_confidence", "random", "origin", "maskgit_plus", "topk_margin", "entropy"} <= CONFIDENCES.keys()
    with pytest.raises(ValueError, match="goes by threshold="):
        DiffusionConfig(alg="confidence_threshold")
    with pytest.raises(ValueError, match="contradicts"):
        DiffusionConfig(remasking="low_confidence", alg="entropy")


def test_max_length_counts_the_prompt(llada, padded):
    expected = dkv.generate(llada, IDS, max_new_tokens=7).sequences
    assert torch.equal(dkv.generate(llada, IDS, max_length=10).sequences, expected)
    ids, mask = padded([[5, 9], [7, 3, 20, 41, 2]])
    assert dkv.generate(llada, ids, mask, max_length=9).sequences.shape == (2, 9)
    config = DiffusionConfig(max_length=10)
    assert torch.equal(dkv.generate(llada, IDS, generation_config=config).sequences, expected)
    assert dkv.generate(llada, IDS, generation_config=config, max_new_tokens=2).sequences.shape == (2, 5)
    assert config.max_length == 10
    with pytest.warns(UserWarning, match="max_new_tokens is used"):
        assert dkv.generate(llada, IDS, max_length=10, max_new_tokens=2).sequences.shape == (2, 5)
    impossible = [
        ({"max_length": 3}, r"max_length \(3\) counts the prompt"),
        ({"max_length": 257}, "need 257 positions"),
        ({"max_length": 19, "block_length": 4, "steps": 3}, "16 new tokens in blocks of 4 need 4"),
    ]
    for given, message in impossible:
        with pytest.raises(ValueError, match=message):
            dkv.generate(llada, IDS, **given)
    with pytest.raises(ValueError, match="max_length does not go with infill"):
        dkv.infill(llada, IDS, max_length=10)


def test_attributes_act_or_are_refused(llada):
    config = DiffusionConfig()
    config.gen_length, config.do_sample, config.remasking = 4, True, "topk_margin"
    assert (config.max_new_tokens, config.temperature, config.confidence) == (4, 1.0, "margin")
    for name, value in {"num_beams": 3, "repetition_penalty": 1.2, "tempreature": 0.5, "output_history": 1}.items():
        config = DiffusionConfig()
        setattr(config, name, value)
        with pytest.raises(ValueError, match=name):
            dkv.generate(llada, IDS, generation_config=config)


def test_an_attribute_takes_what_an_argument_takes():
    config = DiffusionConfig(max_length=50)
    config.confidence, config.temperature, config.steps = "maskgit_plus", None, np.int64(3)
    assert (config.confidence, config.temperature, config.steps) == ("probability", 0.0, 3)
    config.max_new_tokens = 7
    assert (config.max_new_tokens, config.max_length) == (7, None)
    config.cache = "decode"
    assert config.cache == dkv.DecodeCache()
    # What does not go together yet is seen when it is used.
    config.threshold, config.alg = 0.5, "confidence_threshold"
    config.block_length, config.max_new_tokens = 4, 64
    config.steps = 16
    config.validate()
    before = config.settings()
    with pytest.raises(ValueError, match="unknown policy 'decodes'"):
        config.cache = "decodes"
    assert config.settings() == before


@pytest.mark.parametrize("settings", [{"max_length": 50}, {"max_length": 50, "cache": "pd", "seed": 3}])
def test_max_length_counts_after_any_way_of_keeping(settings, tmp_path):
    config = DiffusionConfig(max_new_tokens=7)
    config.update(**settings)
    config.save_pretrained(tmp_path)
    kept = [DiffusionConfig(**plain) for plain in (config.to_dict(), config.settings())]
    for again in (*kept, DiffusionConfig.from_pretrained(tmp_path)):
        assert again.max_length == 50 and again.cache == config.cache


@pytest.mark.parametrize("content", [[1, 2], "x", None])
def test_a_file_without_settings_is_refused(content, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a configuration must be a dict of settings, got"):
        DiffusionConfig.from_pretrained(tmp_path)


def test_what_would_have_no_effect_is_refused(llada, dream):
    with pytest.raises(ValueError, match="selection_temperature needs a confidence to go by"):
        DiffusionConfig(alg="origin", alg_temp=0.5)
    for call in (dkv.generate, dkv.stream):
        with pytest.raises(ValueError, match=r"eps=0.01 is of the time schedule, and this one has blocks"):
            call(llada, IDS, max_new_tokens=4, eps=0.01)
        with pytest.raises(ValueError, match=r"eps=0.01 is of the time schedule"):
            call(dream, IDS, max_new_tokens=4, eps=0.01, block_length=2)
    assert dkv.generate(dream, IDS, max_new_tokens=4, eps=0.01).sequences.shape == (2, 7)
    with pytest.raises(ValueError, match="must be one of probability"):
        DiffusionConfig(alg=np.array([1, 2]))


def test_files_of_transformers(tmp_path):
    GenerationConfig(bos_token_id=1, eos_token_id=[2, 3], do_sample=True, temperature=0.6, top_p=0.9).save_pretrained(
        tmp_path
    )
    config = DiffusionConfig.from_pretrained(tmp_path)
    assert (config.temperature, config.top_p, config.eos_token_id, config.bos_token_id) == (0.6, 0.9, [2, 3], 1)
    with pytest.warns(UserWarning, match="does not say which cache: none is used"):
        assert DiffusionConfig.from_dict({"use_cache": True, "bos_token_id": 1}).cache == dkv.NoCache()
    given = DiffusionConfig(
        do_sample=True, use_cache=True, cache_type="pd", cache_steps=3, max_length=50, logits_eos_inf=True, alg="origin"
    )
    given.save_pretrained(tmp_path)
    for again in (DiffusionConfig.from_pretrained(tmp_path), copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert (
            again.settings() == given.settings() and again.cache == dkv.PrefillDecodeCache(3) and again.max_length == 50
        )
