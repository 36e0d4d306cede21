"""Families that are not loaded are named, and never taken for one that is."""

import json
from pathlib import Path

import pytest

from dkv.models import load
from dkv.models.families import FAMILIES, family_of

NAMED = [
    ({"model_type": "llada", "architectures": ["LLaDAMoEModelLM"]}, "LLaDA-MoE"),
    ({"model_type": "lladamoe", "architectures": ["LLaDAMoEModel"]}, "LLaDA-MoE"),
    ({"model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"]}, "LLaDA2.x"),
    ({"model_type": "llada2_moe_veomni"}, "LLaDA2.x"),
    ({"model_type": "llada21_moe"}, "LLaDA2.x"),
    ({"model_type": "llava_llada", "architectures": ["LlavaLLaDAModelLM"]}, "LLaDA-V"),
    ({"model_type": "sdar", "architectures": ["SDARForCausalLM"]}, "SDAR"),
    ({"model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"]}, "SDAR"),
    ({"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"]}, "Fast-dLLM v2"),
    ({"model_type": "diffusion_gemma", "architectures": ["DiffusionGemmaForBlockDiffusion"]}, "DiffusionGemma"),
    ({"model_type": "nemotron_labs_diffusion"}, "Nemotron-Labs-Diffusion"),
    ({"architectures": ["NemotronLabsDiffusionModel"]}, "Nemotron-Labs-Diffusion"),
    ({"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"]}, "A2D"),
    ({"model_type": "a2d-llama"}, "A2D"),
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
@pytest.mark.parametrize("kind", ["llada", "Dream"])
def test_experts_without_the_name_of_a_class(kind, field):
    with pytest.raises(ValueError, match=rf"mixture of experts \({field}=64\).*LLaDA-MoE.*does not load"):
        family_of({"model_type": kind, field: 64})
    assert family_of({"model_type": kind, field: None})


@pytest.mark.parametrize("found", ["LLaDAModelLM", {"a": 1}, [1], [["LLaDAModelLM"]], 5])
def test_architectures_that_are_no_list_of_names(found):
    with pytest.raises(ValueError, match=r"architectures=.*; a list of names or null is needed"):
        family_of({"model_type": "llada", "architectures": found})


@pytest.mark.parametrize("kind", [None, 5, ["llada"], {"llada": 1}, True, ""])
def test_a_model_type_that_is_no_name(kind):
    with pytest.raises(ValueError, match="unknown model family: model_type is "):
        family_of({"model_type": kind})


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
