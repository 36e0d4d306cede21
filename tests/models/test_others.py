"""Families that are not loaded are named, and never taken for one that is."""

import json
from pathlib import Path

import pytest

from dkv.models import load
from dkv.models.families import FAMILIES, family_of

NAMED = [
    ({"model_type": "llada22_moe"}, "LLaDA2.x, but for 2.0 and 2.1"),
    ({"model_type": "llada2_moe_next", "architectures": ["LLaDA22MoeModelLM"]}, "LLaDA2.x, but for 2.0 and 2.1"),
    ({"model_type": "llava_llada", "architectures": ["LlavaLLaDAModelLM"]}, "LLaDA-V"),
    ({"model_type": "wedlm"}, "WeDLM"),
    ({"model_type": "rnd1"}, "RND1"),
    ({"model_type": "llada", "architectures": ["LLaDAForMultiModalGeneration"]}, "Lumina-DiMOO"),
]


@pytest.mark.parametrize(("config", "name"), NAMED, ids=[str(c.get("model_type")) for c, _ in NAMED])
def test_a_known_family_is_named(small, config, name):
    known = r"which dkv does not load .*known are llada \(.*LLaDAModelLM.*dream \(.*DreamModel"
    with pytest.raises(ValueError, match=rf"this model is of the family {name}.*{known}"):
        load(small().write(**{"model_type": None, "architectures": None, **config}))


LEFT_TO_RIGHT = ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel", "MistralForCausalLM"]


@pytest.mark.parametrize("name", LEFT_TO_RIGHT)
def test_a_model_that_writes_from_left_to_right_is_called_so(name):
    with pytest.raises(ValueError, match=rf"unknown model family: .*{name}.*by its class it writes from left to right"):
        family_of({"model_type": "any", "architectures": [name]})


@pytest.mark.parametrize("field", ["num_experts", "n_routed_experts", "num_local_experts", "moe_intermediate_size"])
@pytest.mark.parametrize("kind", ["sdar", "Dream"])
def test_experts_without_the_name_of_a_class(kind, field):
    with pytest.raises(ValueError, match=rf"mixture of experts \({field}=64\), and the family {kind.lower()} has none"):
        family_of({"model_type": kind, field: 64})
    assert family_of({"model_type": kind, field: None})


def test_LLaDA_is_told_from_LLaDA_MoE_by_its_experts():
    assert family_of({"model_type": "llada"}).name == "llada"
    assert family_of({"model_type": "llada", "num_experts": 64}).name == "llada_moe"
    assert family_of({"model_type": "llada", "architectures": ["LLaDAMoEModelLM"]}).name == "llada_moe"
    with pytest.raises(ValueError, match=r"mixture of experts \(num_experts=64\), and the family llada has none"):
        family_of({"model_type": "llada", "architectures": ["LLaDAModelLM"], "num_experts": 64})


@pytest.mark.parametrize("found", ["LLaDAModelLM", {"a": 1}, [1], [["LLaDAModelLM"]], 5])
def test_architectures_that_are_no_list_of_names(found):
    with pytest.raises(ValueError, match=r"architectures=.*; a list of names or null is needed"):
        family_of({"model_type": "llada", "architectures": found})


@pytest.mark.parametrize("kind", [None, 5, ["llada"], {"llada": 1}, True, ""])
def test_a_model_type_that_is_no_name(kind):
    with pytest.raises(ValueError, match="unknown model family: model_type is "):
        family_of({"model_type": kind})


PLAIN = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def test_a_plain_configuration_needs_the_name_of_its_family():
    with pytest.raises(ValueError, match=r"unknown model family: .*from left to right.*family='stable_diffcoder'"):
        family_of(PLAIN)
    assert family_of(PLAIN, "stable_diffcoder") is FAMILIES["stable_diffcoder"]
    with pytest.raises(ValueError, match="family='stable-diffcoder' is not known: did you mean 'stable_diffcoder'"):
        family_of(PLAIN, "stable-diffcoder")
    with pytest.raises(ValueError, match=r"mixture of experts \(num_experts=8\)"):
        family_of({**PLAIN, "num_experts": 8}, "stable_diffcoder")


def test_relatives_that_are_loaded():
    """Other weights under the same classes, or the class of a loaded family under another model_type."""
    for name, config in {
        "dream": {"model_type": "Dream", "architectures": ["DreamModel"]},
        "llada": {"model_type": "sdar", "architectures": ["LLaDAModelLM"]},
    }.items():
        assert family_of(config) is FAMILIES[name]


def test_recorded_configurations_are_not_mistaken():
    for path in (Path(__file__).parents[1] / "golden").glob("*/config.json"):
        assert family_of(json.loads(path.read_text())).name == path.parent.name.partition("_")[0]


FAMILY_OF = {
    "sdar_tiny": "sdar",
    "sdar_tied": "sdar",
    "a2d_qwen3_tied": "a2d-qwen3",
    "a2d_qwen2": "a2d-qwen2",
    "fast_tiny": "fast_dllm_v2",
    "nemotron_tiny": "nemotron",
}


@pytest.mark.parametrize(("folder", "name"), FAMILY_OF.items())
def test_the_families_of_2026_by_class_and_by_model_type(folder, name):
    (path,) = (Path(__file__).parents[1] / "golden/families").glob(f"*/{folder}/config.json")
    config = json.loads(path.read_text())
    for field in ("architectures", "model_type"):
        assert family_of({**config, field: None}) is FAMILIES[name]
    assert family_of({**config, "auto_map": {"AutoModel": "modeling.Other"}}) is FAMILIES[name]
