"""Which models are refused and when, and what no mask means to the others. All of them: test_hf_models.py."""

import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM

from dkv.integrations import hf_attention as hf
from dkv.integrations.hf_support import kind_of_masks
from tests.dkv.integrations.conftest import GQA, NO_DROPOUT, V5
from tests.dkv.integrations.conftest import SIZES as PLAIN

SIZES = {**PLAIN, **NO_DROPOUT}
IDS = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(1))
MASKS = [None, torch.ones_like(IDS), torch.ones_like(IDS).index_fill(1, torch.tensor([10, 11]), 0)]
PADDING = pytest.mark.parametrize("mask", MASKS, ids=["none", "ones", "right"])
new = pytest.mark.skipif(not V5, reason="goes through AttentionInterface since transformers 5")


def make(cls, config, implementation: str) -> nn.Module:
    """A model with weights that make attention sharp, the same for each implementation."""
    torch.manual_seed(0)
    model = cls._from_config(config(), attn_implementation=implementation).eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=1.0 if "embed" in name else 0.3)
        elif weight.shape == (1,):
            nn.init.ones_(weight)  # gates that are closed at first
    return model


@torch.no_grad()
def assert_equals_eager(cls, config, mask, **inputs) -> None:
    real = slice(None) if mask is None else mask.bool()
    out, plain = (make(cls, config, x)(input_ids=IDS, attention_mask=mask, **inputs)[0][real] for x in ("dkv", "eager"))
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


def splinter():
    return transformers.SplinterConfig(**SIZES, max_position_embeddings=32)


def clap():
    return transformers.ClapTextConfig(**SIZES, max_position_embeddings=32)


def mllama():
    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return config(**GQA, cross_attention_layers=[1], max_position_embeddings=32, rope_parameters=rope)


@new
@PADDING
@pytest.mark.parametrize("name", ["splinter", "clap", "mllama"])
def test_R01_a_module_without_a_flag_is_not_causal(name, mask):
    if name == "mllama":  # its cross attention, without a mask of its own
        states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
        cls = transformers.models.mllama.modeling_mllama.MllamaTextModel
        assert_equals_eager(cls, mllama, mask, cross_attention_states=states)
    else:
        config = {"splinter": splinter, "clap": clap}[name]
        cls = {"splinter": transformers.SplinterModel, "clap": transformers.ClapTextModel}[name]
        assert_equals_eager(cls, config, mask)


def nllb():
    sizes = {
        f"{part}_{x}": n
        for part in ("encoder", "decoder")
        for x, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48), ("sparse_step", 2))
    }
    return transformers.NllbMoeConfig(
        **sizes, d_model=32, vocab_size=50, num_experts=4, dropout=0.0, attention_dropout=0.0, pad_token_id=0
    )


@new
def test_R02_a_decoder_with_a_wrong_flag_sees_no_later_token():
    other = IDS.clone()
    other[:, -1] = IDS[:, -1] % 46 + 3
    before, after = [], []
    for implementation in ("dkv", "eager"):
        model = make(transformers.NllbMoeModel, nllb, implementation)
        with torch.no_grad():
            before.append(model(IDS, decoder_input_ids=IDS)[0])
            after.append(model(IDS, decoder_input_ids=other)[0])
    assert torch.equal(before[0][:, :-1], after[0][:, :-1])
    assert not torch.equal(before[0][:, -1], after[0][:, -1])
    torch.testing.assert_close(before[0], before[1], rtol=1e-5, atol=1e-5)


@new
@PADDING
def test_a_decoder_whose_configuration_turns_its_flag_off(mask):
    """Gemma inside of PaliGemma: eager attention is causal all the same."""
    config = lambda: transformers.GemmaConfig(**GQA, head_dim=8, use_bidirectional_attention=True)  # noqa: E731
    assert_equals_eager(transformers.GemmaModel, config, mask)


ESM = """
import torch, transformers, dkv
from transformers import EsmConfig
from dkv.integrations import hf_support
dkv.register()
config = EsmConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=33,
                   pad_token_id=1, mask_token_id=32, max_position_embeddings=40)
for first in ("EsmModel", "EsmForProteinFolding"):
    getattr(transformers, first)
    hf_support._kind_of_masks.cache_clear(), hf_support._reason.cache_clear()
    ids, outs = torch.arange(4, 28).view(2, 12), []
    for implementation in ("dkv", "sdpa"):
        torch.manual_seed(0)
        model = transformers.EsmModel._from_config(config, attn_implementation=implementation).eval()
        with torch.no_grad():
            outs.append(model(ids)[0])
    torch.testing.assert_close(*outs)
    print(hf_support.kind_of_masks(EsmConfig), "served")
"""


@new
@pytest.mark.slow
def test_R07_what_else_is_imported_decides_nothing():
    out = subprocess.run([sys.executable, "-c", ESM], capture_output=True, text=True, check=True).stdout
    assert out == 2 * "(True, False) served\n"


@pytest.mark.parametrize("name", ["DebertaV2", "Deberta", "XLM", "Mamba", "ResNet"])
def test_R08_a_model_that_never_calls_the_attention_is_refused(name, tmp_path):
    """When it is built, in whichever way, and when it is told to change."""
    config = getattr(transformers, f"{name}Config")()
    for key, size in (("num_hidden_layers", 1), ("n_layers", 1), ("vocab_size", 60)):
        if hasattr(config, key):
            setattr(config, key, size)
    message = rf"cannot serve {name}Model.*AttentionInterface.*eager"
    with pytest.raises(ValueError, match=message):
        AutoModel.from_config(config, attn_implementation="dkv")
    model = AutoModel.from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation("dkv")
    assert model.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(tmp_path, attn_implementation="dkv")


def test_a_head_on_a_model_that_never_calls_is_refused():
    config = transformers.DebertaV2Config(**SIZES)
    with pytest.raises(ValueError, match="AttentionInterface"):
        AutoModelForMaskedLM.from_config(config, attn_implementation="dkv")


@pytest.mark.parametrize("name", ["Falcon", "Data2VecVision", "SamVision", "Git", "GPTNeo"])
def test_a_table_of_attentions_is_refused_with_words(name):
    config = getattr(transformers, f"{name}Config")()
    with pytest.raises(ValueError, match=r"table of its own.*eager"):
        AutoModel.from_config(config, attn_implementation="dkv")


def detr():
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    return transformers.DetrConfig(use_timm_backbone=False, backbone=None, backbone_config=backbone, **sizes)


@new
def test_a_part_without_attention_does_not_stop_the_rest():
    model = AutoModel.from_config(detr(), attn_implementation="dkv")
    model.set_attn_implementation("eager")
    model.set_attn_implementation("dkv")
    assert model.config._attn_implementation == "dkv"


def llava(vision):
    text = transformers.LlamaConfig(**GQA)
    return transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=49)


@new
def test_parts_may_have_names_of_their_own():
    vision = transformers.SamVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, mlp_dim=32)
    with pytest.raises(ValueError, match="SamVision"):
        AutoModel.from_config(llava(vision), attn_implementation="dkv")
    names = {"text_config": "dkv", "vision_config": "eager"}
    model = AutoModel.from_config(llava(vision), attn_implementation=names)
    assert model.language_model.config._attn_implementation == "dkv"


@new
def test_a_name_written_into_the_configuration_is_refused_at_the_first_mask():
    model = AutoModel.from_config(transformers.MPNetConfig(**SIZES), attn_implementation="eager")
    model.config._attn_implementation = "dkv"
    with pytest.raises(ValueError, match=r"MPNet.*AttentionInterface.*eager"):
        model(IDS, torch.ones_like(IDS))


@new
def test_what_the_flags_of_usual_models_allow():
    """The fast ways: bool masks, and none at all for a causal pattern."""
    both, no_flag, neither = (True, True), (True, False), (False, False)
    kinds = {"Llama": both, "Mistral": both, "Bert": no_flag, "ModernBert": no_flag, "Gemma": no_flag}
    for name, kind in (kinds | {"Splinter": neither}).items():
        assert kind_of_masks(getattr(transformers, f"{name}Config")) == kind, name


class Unusual(transformers.LlamaConfig):
    """Not of the library: taken for what it derives from."""


def test_a_derived_configuration():
    assert kind_of_masks(Unusual) == kind_of_masks(transformers.LlamaConfig)
    model = transformers.LlamaModel._from_config(Unusual(**GQA), attn_implementation="dkv").eval()
    plain = transformers.LlamaModel._from_config(Unusual(**GQA), attn_implementation="eager").eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS)[0], plain(IDS)[0], rtol=1e-5, atol=1e-5)


def test_registered_twice_wraps_once():
    methods = [
        getattr(transformers.PreTrainedModel, x) for x in ("get_correct_attn_implementation", "set_attn_implementation")
    ]
    hf.register()
    assert methods == [
        transformers.PreTrainedModel.get_correct_attn_implementation,
        transformers.PreTrainedModel.set_attn_implementation,
    ]
