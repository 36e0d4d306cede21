"""Folders of mixtures: shards, dtypes, tensors that are missing or left over, and the memory that loading takes."""

import json
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dkv.models import load, wrap
from dkv.models.export import save_model
from dkv.models.skeleton import fill

ROOT = Path(__file__).parents[1] / "golden" / "families"
FOLDERS = [ROOT / "llada2" / "llada2_tiny", ROOT / "llada_moe" / "llada_moe_tiny", ROOT / "sdar" / "sdar_moe_tiny"]


def written(folder: Path, tensors: dict[str, torch.Tensor], config: dict, shards: int = 1) -> Path:
    """A folder in so many files, whose tensors take turns, so that the experts of a layer are in all of them."""
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    places = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def content(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("pack", [None, False])
def test_shards_give_the_same_model(folder, pack, tmp_path):
    model = load(written(tmp_path, *content(folder), shards=5), device="cpu", pack=pack)
    expected = load(folder, device="cpu", pack=pack).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_pieces_are_where_they_belong():
    folder = FOLDERS[0]
    model, (tensors, _) = load(folder, device="cpu", pack=False, dtype="bfloat16"), content(folder)
    layer = model.layers[1]
    for e in range(8):
        gate, up = layer.experts.gate_up.weight[e].split(24)
        name = f"model.layers.1.mlp.experts.{e}"
        assert torch.equal(gate, tensors[f"{name}.gate_proj.weight"])
        assert torch.equal(up, tensors[f"{name}.up_proj.weight"])
        assert torch.equal(layer.experts.down.weight[e], tensors[f"{name}.down_proj.weight"])
    rows = torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight])
    assert torch.equal(rows, tensors["model.layers.1.attention.query_key_value.weight"])
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [None, "auto", "bfloat16", "float16", "float64"])
def test_the_bias_of_a_router_is_never_narrow(dtype, tmp_path):
    model = load(FOLDERS[0], dtype=dtype, device="cpu", pack=False)
    bias = model.layers[1].experts.router.expert_bias
    recorded = content(FOLDERS[0])[0]["model.layers.1.mlp.gate.expert_bias"]
    assert bias.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert torch.equal(bias.float(), recorded)
    assert model.to(torch.bfloat16).layers[1].experts.router.expert_bias.dtype.itemsize >= 4
    save_model(model, tmp_path)
    assert content(tmp_path)[0]["model.layers.1.mlp.gate.expert_bias"].dtype == bias.dtype


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_is_missing_or_left_over(folder, tmp_path):
    tensors, config = content(folder)
    experts = sorted(name for name in tensors if ".experts." in name)
    few = {name: t for name, t in tensors.items() if not re.search(r"layers\.2\.mlp\.experts\.[67]\.", name)}
    first = r"model\.layers\.2\.mlp\.experts\.6\.gate_proj\.weight"
    with pytest.raises(ValueError, match=rf"lacks tensors that its configuration asks for: {first}, .* and 2 more"):
        load(written(tmp_path, few, config))
    more = {**tensors, "model.layers.2.mlp.experts.8.up_proj.weight": tensors[experts[-1]].clone()}
    with pytest.raises(
        ValueError, match=r"has unexpected tensors: model\.layers\.2\.mlp\.experts\.8\.up_proj\.weight;"
    ):
        load(written(tmp_path, more, config))
    odd = {**tensors, experts[0]: tensors[experts[0]][:, 1:].contiguous()}
    with pytest.raises(ValueError, match=rf"{re.escape(experts[0])} in .* has shape .* asks for"):
        load(written(tmp_path, odd, config))
    with pytest.raises(ValueError, match=r"tensors are not 100000 experts"):
        load(written(tmp_path, tensors, {**config, "num_experts": 100000}))


def test_fused_rows_of_another_number(tmp_path):
    tensors, config = content(FOLDERS[0])
    name = "model.layers.0.attention.query_key_value.weight"
    with pytest.raises(ValueError, match=r"query_key_value.weight in .* has shape \[127, 64\].* asks for \[128, 64\]"):
        load(written(tmp_path, {**tensors, name: tensors[name][1:].contiguous()}, config))


def test_one_tensor_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """When a piece is asked for, those before it that were copied into packed parameters are gone."""
    alive = weakref.WeakSet()

    def counted(model, pieces, tensors):
        def each():
            for name, tensor in tensors:
                if ".experts." in name:
                    assert len(alive) <= 1, f"{len(alive)} pieces before {name}"
                    alive.add(tensor)
                yield name, tensor

        fill(model, pieces, each())

    monkeypatch.setattr("dkv.models.loader.fill", counted)
    load(written(tmp_path, *content(FOLDERS[1]), shards=3), device="cpu", pack=False)
    assert not alive


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_wrap_refuses_mixtures(folder):
    original = nn.Linear(2, 2)
    original.config = SimpleNamespace(**content(folder)[1])
    with pytest.raises(ValueError, match=r"a mixture of experts \(.*\) cannot be shared.*save_pretrained.*dkv.load"):
        wrap(original)


def test_a_model_of_transformers_by_its_folder(tmp_path):
    """Qwen3-MoE, read causally, is SDAR-MoE in blocks of one slot; with dense layers, and weights as they are."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        vocab_size=64,
        moe_intermediate_size=20,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        mlp_only_layers=[1],
        rope_theta=1e4,
    )
    torch.manual_seed(0)
    original = transformers.Qwen3MoeForCausalLM(config).eval()
    original.save_pretrained(tmp_path)
    model = load(tmp_path, device="cpu", family="sdar_moe", mask_token_id=63, attention_block=1)
    assert model.spec.mixture.dense_layers == (1,) and not model.spec.mixture.renormalise
    ids = torch.randint(0, 63, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), original(ids).logits, atol=1e-4, rtol=1e-4)
