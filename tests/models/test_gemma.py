"""DiffusionGemma: what a configuration may say, which tensors a file may hold, and sharing a model of transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dkv
from dkv.models.families import family_of
from dkv.models.families.diffusion_gemma import FAMILY
from dkv.models.gemma_layer import Experts
from dkv.models.gemma_spec import GemmaLayer

FOLDER = Path(__file__).parents[1] / "golden" / "families" / "diffusion_gemma" / "gemma_tiny"


def config_of(text: dict | None = None, **changes) -> dict:
    config = json.loads((FOLDER / "config.json").read_text())
    return {**config, "text_config": {**config["text_config"], **(text or {})}, **changes}


@pytest.fixture
def folder(tmp_path):
    copy = tmp_path / "gemma"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("cases"))
    return copy


def test_the_spec_of_a_configuration():
    spec = FAMILY.spec(config_of())
    assert (spec.num_layers, spec.block_length, spec.ends, spec.pad_token_id) == (4, 8, (1,), 0)
    assert spec.layers[0] == GemmaLayer(head_dim=16, num_kv_heads=2, window=8, rope_theta=1e4)
    assert spec.layers[1] == GemmaLayer(head_dim=24, num_kv_heads=1, window=None, rope_theta=1e6, rotated=0.25)
    assert (spec.softcap, spec.mask_token_id, spec.attention) == (30.0, None, "prefix_causal")


def test_full_layers_by_the_older_fields_and_by_their_kind():
    own = {"per_layer_config": None, "global_head_dim": 24, "num_global_key_value_heads": 1}
    assert FAMILY.spec(config_of(own)).layers == FAMILY.spec(config_of()).layers
    own = {"per_layer_config": {"full_attention": {"head_dim": 24, "num_key_value_heads": 1}}}
    assert FAMILY.spec(config_of(own)).layers == FAMILY.spec(config_of()).layers


def test_what_a_configuration_may_leave_out():
    gone = dict.fromkeys(("layer_types", "rope_parameters", "per_layer_config", "sliding_window", "rms_norm_eps"))
    spec = FAMILY.spec(config_of({**gone, "num_hidden_layers": 7}, canvas_length=None))
    assert [layer.window for layer in spec.layers] == [512] * 5 + [None, None]
    assert spec.layers[5] == GemmaLayer(head_dim=512, num_kv_heads=2, window=None, rope_theta=1e6, rotated=0.25)
    assert spec.block_length == 256


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ({"use_bidirectional_attention": "all"}, {}, "use_bidirectional_attention"),
        ({"hidden_activation": "silu"}, {}, "hidden_activation"),
        ({"attention_bias": True}, {}, "attention_bias"),
        ({"layer_types": ["sliding_attention"]}, {}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 4}, {}, "layer_types"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, {}, "rope_type"),
        ({"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}}, {}, "partial_rotary_factor"),
        ({"num_experts": None}, {}, "num_experts"),
        ({"eos_token_id": 192}, {}, "eos_token_id"),
        ({}, {"eos_token_id": [1, -1]}, "eos_token_id"),
        ({}, {"text_config": 3}, "text_config"),
    ],
)
def test_what_is_not_implemented_is_refused(text, changes, message):
    with pytest.raises(ValueError, match=message):
        FAMILY.spec(config_of(text, **changes))


def test_it_is_recognised():
    assert family_of(config_of()) is FAMILY
    assert family_of(config_of(architectures=None)) is FAMILY


def test_images_and_shared_weights_in_a_file_are_left_out(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.encoder.language_model.norm.weight"] = tensors["model.decoder.norm.weight"].clone()
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    model = dkv.load(folder, device="cpu")
    assert model.head.weight is model.embed.weight and model.dtype == torch.float32
    assert not any("vision" in name for name, _ in model.named_parameters())
    assert sum(p.numel() for p in model.parameters()) == model.num_parameters


@pytest.mark.parametrize("name", ["model.decoder.layers.1.router.scale", "model.encoder.language_model.layers.2"])
def test_a_tensor_that_is_missing_is_named(folder, name):
    tensors = load_file(folder / "model.safetensors")
    lost = next(key for key in tensors if key.startswith(name))
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"lacks tensors .*{lost}"):
        dkv.load(folder, device="cpu")


def test_a_tensor_too_many_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.decoder.layers.0.mlp.bias": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected tensors: model\.decoder\.layers\.0\.mlp\.bias"):
        dkv.load(folder, device="cpu")


def test_it_is_not_packed():
    with pytest.raises(ValueError, match="pack=True"):
        dkv.load(FOLDER, device="cpu", pack=True)


def test_settings_of_the_folder_are_the_defaults(folder):
    saved = {"max_new_tokens": 16, "sampler_config": {"entropy_bound": 0.7, "_cls_name": "EntropyBoundSamplerConfig"}}
    (folder / "generation_config.json").write_text(json.dumps({**saved, "eos_token_id": [1, 5], "t_min": 0.2}))
    model = dkv.load(folder, device="cpu")
    output = dkv.generate(model, torch.tensor([[4, 5, 6]]), max_denoising_steps=2, seed=0)
    assert output.stats.settings["entropy_bound"] == 0.7 and output.stats.settings["t_min"] == 0.2
    assert output.stats.settings["eos_token_id"] == (1, 5) and output.stats.settings["max_new_tokens"] == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_transformers_is_shared_and_gives_the_same_logits(dtype):
    transformers = pytest.importorskip("transformers", minversion="5.24")
    hf = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(FOLDER, dtype=dtype).eval()
    model = dkv.wrap(hf)
    assert model.layers[0].layer_scalar.data_ptr() == hf.model.decoder.layers[0].layer_scalar.data_ptr()
    torch.manual_seed(0)
    ids, canvas = torch.randint(2, 190, (2, 11)), torch.randint(2, 190, (2, 8))
    buffer, starts = dkv.KVCache(2, 19), torch.full((2,), 11)
    with torch.no_grad():
        expected = hf(input_ids=ids, decoder_input_ids=canvas).logits
        model.encode(ids, torch.zeros_like(starts), buffer)
        found = model.logits(model.decode(canvas, torch.arange(2), starts, buffer, None))
    # In bfloat16 an expert may be another: most logits are close, all are where nothing is rounded.
    worst = (found - expected).abs().flatten()
    assert worst.max() < 2e-4 if dtype == torch.float32 else worst.median() < 0.2


def test_a_long_prompt_is_encoded_in_pieces(monkeypatch):
    model = dkv.load(FOLDER, device="cpu")
    ids, found = torch.arange(2, 28)[None].repeat(2, 1), []
    for piece in (1024, 5):
        monkeypatch.setattr("dkv.models.gemma.PIECE", piece)
        buffer = dkv.KVCache(2, 30)
        found.append(model.encode(ids, torch.tensor([0, 0]), buffer))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_experts_one_by_one_where_torch_has_no_grouped_product(monkeypatch):
    experts = dkv.load(FOLDER, device="cpu").layers[0].experts
    torch.manual_seed(0)
    # The last expert gets nothing.
    x, weight, expert = torch.randn(5, 64), torch.rand(5, 2), torch.tensor([[0, 1], [2, 0], [0, 2], [1, 2], [0, 1]])
    found = experts(x, weight, expert)
    monkeypatch.delattr("torch.nn.functional.grouped_mm")
    torch.testing.assert_close(experts(x, weight, expert), found)
    by_hand = torch.zeros(5, 64)
    for row, numbers in enumerate(expert.tolist()):
        for place, number in enumerate(numbers):
            gate, up = (experts.gate_up_proj[number] @ x[row]).chunk(2)
            hidden = torch.nn.functional.gelu(gate, approximate="tanh") * up
            by_hand[row] += weight[row, place] * (experts.down_proj[number] @ hidden)
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 12])
def test_experts_of_any_size(dtype, size):
    """What a process has of an expert may be any number of features."""
    spec = FAMILY.spec(config_of({"moe_intermediate_size": size, "hidden_size": 20, "num_attention_heads": 2}))
    experts = Experts(spec).requires_grad_(False)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    x, weight, expert = torch.randn(6, 20), torch.rand(6, 2), torch.tensor([[0, 1], [3, 0]]).repeat(3, 1)
    found = experts.to(dtype)(x.to(dtype), weight, expert)
    exact = experts.double()(x.to(dtype).double(), weight.double(), expert)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.5}
    torch.testing.assert_close(found.double(), exact, **close)
