"""The families of 2026 on recorded runs: logits, hidden states, and the way out and back in."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dkv.core.kv_cache import KVCache
from dkv.models import Transformer, load, wrap
from dkv.models.export import save_model, to_checkpoint
from dkv.models.families import FAMILIES
from dkv.models.joining import JoinedLayer, join_
from dkv.models.packing import PackedLayer, can_pack

ROOT = Path(__file__).parents[1] / "golden" / "families"
# Nemotron's cases have two kinds of logits, and DiffusionGemma's have two readers: they have tests of their own.
OWN = ("nemotron", "diffusion_gemma")
CASES = sorted(path for path in ROOT.glob("*/*/cases/forward*.json") if path.parts[-4] not in OWN)
MODELS = sorted({path.parents[1] for path in CASES} | {ROOT / "nemotron" / "nemotron_tiny"})
LAYERS = {"plain": nn.Module, "packed": PackedLayer, "joined": JoinedLayer}


@pytest.fixture(params=LAYERS)
def loaded(request):
    """Load a folder with layers of one kind."""
    if request.param == "packed" and not can_pack():
        pytest.skip("this build of PyTorch has no oneDNN for this CPU")

    def loaded(folder: Path) -> Transformer:
        model = load(folder, device="cpu", pack=request.param == "packed")
        model = join_(model) if request.param == "joined" else model
        assert all(isinstance(layer, LAYERS[request.param]) for layer in model.layers)
        return model

    return loaded


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_recorded_passes(loaded, path):
    """Every hidden state and the logits, as the published classes computed them."""
    model, recorded, hidden = loaded(path.parents[1]), load_file(path.with_suffix(".safetensors")), []
    for layer in model.layers:
        # What the layer before it computed is added to the residual by its first norm.
        layer.register_forward_pre_hook(lambda _, args: hidden.append(sum(x for x in args[:2] if x is not None)))
    model.head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    ids, length = recorded["input_ids"].long(), json.loads(path.read_text()).get("block_length")
    blocks = torch.arange(ids.shape[1]) // (length or ids.shape[1])
    close(model(ids, block_ids=blocks.expand_as(ids)), recorded["logits"])
    assert len(hidden) == model.spec.num_layers + 1
    for i, found in enumerate(hidden):
        close(found, recorded[f"hidden_{i}"])
    if length == model.spec.block_length:
        close(model(ids), recorded["logits"])
    if "logits_full_attention" in recorded:
        close(model(ids, block_ids=torch.zeros_like(ids)), recorded["logits_full_attention"])


def test_nemotron_reads_causally_and_bidirectionally(loaded):
    """With queries that grow from slot 16 on."""
    folder = ROOT / "nemotron" / "nemotron_tiny"
    model, recorded = loaded(folder), load_file(folder / "cases" / "forward_41.safetensors")
    ids = recorded["input_ids"].long()
    close(model(ids, block_ids=torch.arange(41)[None]), recorded["logits_causal"])
    close(model(ids), recorded["logits_bidirectional"])
    with torch.no_grad():
        hidden = model.step(ids, torch.arange(41)[None], KVCache(1, 41), outputs=torch.tensor([[2, 40]]))
        close(model.head(hidden), recorded["logits_bidirectional"][:, [2, 40]])


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_export_gives_back_what_was_loaded(folder, tmp_path):
    model = load(folder, device="cpu", pack=False)
    save_model(model, tmp_path)
    again = load(tmp_path, device="cpu", pack=False)
    assert again.spec == model.spec
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    written, recorded = (json.loads((place / "config.json").read_text()) for place in (tmp_path, folder))
    other = {field for field, value in recorded.items() if field in written and written[field] != value}
    assert other <= {"torch_dtype", "use_cache", "max_window_layers", "rope_theta", "bos_token_id"}
    assert written["architectures"] == recorded["architectures"] and written["model_type"] == recorded["model_type"]
    assert set(load_file(tmp_path / "model.safetensors")) == set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("changes", [{"attention": "full", "block_length": None}, {"seeded": True}, {"shifted": True}])
def test_export_refuses_what_the_format_lacks(changes):
    model = load(ROOT / "sdar" / "sdar_tiny", device="cpu", pack=False)
    model.spec = replace(model.spec, **changes)
    with pytest.raises(ValueError, match="the sdar format cannot express"):
        to_checkpoint(model)


MIXTURES = {"llada2_tiny", "llada_moe_tiny", "sdar_moe_tiny"}


@pytest.mark.parametrize("folder", [path for path in MODELS if path.name not in MIXTURES], ids=lambda path: path.name)
def test_wrap_shares_what_is_in_memory(folder):
    original = nn.Module()
    original.config = SimpleNamespace(**json.loads((folder / "config.json").read_text()))
    for name, tensor in load_file(folder / "model.safetensors").items():
        module, (*path, leaf) = original, name.split(".")
        for part in path:
            module = getattr(module, part, None) or module.register_module(part, nn.Module()) or getattr(module, part)
        setattr(module, leaf, nn.Parameter(tensor.float()))
    model, loaded = wrap(original), load(folder, device="cpu", pack=False)
    assert model.spec == loaded.spec
    assert {p.data_ptr() for p in model.parameters()} == {p.data_ptr() for p in original.parameters()}
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids), loaded(ids))


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SIZES |= {"intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 64, "rope_theta": 1e4}
BODIES = [
    ("stable_diffcoder", "Llama", {"attention_bias": True}),
    ("a2d-llama", "Llama", {}),
    ("a2d-qwen2", "Qwen2", {}),
    ("fast_dllm_v2", "Qwen2", {"tie_word_embeddings": True}),
    ("a2d-qwen3", "Qwen3", {"attention_bias": True}),
    ("sdar", "Qwen3", {"head_dim": 12}),
]


@pytest.mark.parametrize(("family", "body", "changes"), BODIES, ids=[f"{f}-{b}" for f, b, _ in BODIES])
def test_blocks_of_one_slot_are_the_causal_model_of_transformers(family, body, changes, tmp_path):
    """A model in memory, whose configuration says nothing of masks; then its folder, with what export adds."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{body}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    original = getattr(transformers, f"{body}ForCausalLM")(config).eval()
    for name, p in original.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    with pytest.raises(ValueError, match=r"no mask_token_id, and a vocabulary of 64 has no usual one.*mask_token_id="):
        wrap(original, family=family)
    model = wrap(original, family=family, mask_token_id=63, attention_block=1)
    assert (model.spec.family, model.spec.mask_token_id, model.spec.block_length) == (family, 63, 1)
    ids = torch.randint(0, 63, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), original(ids).logits, atol=1e-5, rtol=1e-5)
    save_model(model, tmp_path)
    again = load(tmp_path, device="cpu", family="stable_diffcoder" if FAMILIES[family].unmarked else None)
    assert again.spec == model.spec
    close(again(ids), model(ids))


@pytest.mark.parametrize("family", ["sdar", "a2d-llama", "nemotron"])
def test_a_folder_as_the_hub_has_it(small, family):
    """Shards, fields that nobody knows, code that is not run, and a mask that only the tokenizer knows."""
    checkpoint = small(family)
    whole = load(checkpoint.folder, device="cpu")
    auto = {"AutoConfig": "configuration.Other", "AutoModel": "modeling.Other"}
    checkpoint.write(mask_token_id=None, auto_map=auto, transformers_version="4.52.3", ep_size=1, debug=False)
    (checkpoint.folder / "modeling.py").write_text("raise SystemExit('the code of the checkpoint ran')")
    (checkpoint.folder / "added_tokens.json").write_text('{"<|MASK|>": 63, "<think>": 61}')
    checkpoint.shard()
    found = load(checkpoint.folder, device="cpu")
    assert found.spec == whole.spec
    ids = torch.arange(12)[None]
    assert torch.equal(found(ids), whole(ids))
    (checkpoint.folder / "added_tokens.json").unlink()
    with pytest.raises(ValueError, match="no mask_token_id, and a vocabulary of 64 has no usual one"):
        load(checkpoint.folder)
    assert load(checkpoint.folder, device="cpu", mask_token_id=63).spec == whole.spec


@pytest.mark.parametrize("block", [0, -1, 2.0, "4", True])
def test_a_block_that_is_no_number_of_slots(block):
    with pytest.raises(ValueError, match=f"attention_block must be a whole number of at least 1, got {block!r}"):
        load(ROOT / "sdar" / "sdar_tiny", attention_block=block)


@pytest.mark.parametrize("mask", [-1, 2.0, "4", True, 192])
def test_a_mask_that_is_no_token(mask):
    with pytest.raises(ValueError, match=f"mask_token_id.*{mask!r}"):
        load(ROOT / "sdar" / "sdar_tiny", mask_token_id=mask)


def test_blocks_of_a_family_without():
    with pytest.raises(ValueError, match="attention_block=4 has no meaning: llada has no blocks of its own"):
        load("tiny", attention_block=4)


def test_a2d_is_read_in_blocks_where_the_caller_says_so():
    folder = ROOT / "a2d" / "a2d_qwen3_tied"
    spec = load(folder, device="cpu").spec
    assert (spec.attention, spec.block_length, spec.blocks_from_prompt) == ("full", None, False)
    spec = load(folder, device="cpu", attention_block=8).spec
    assert (spec.attention, spec.block_length, spec.blocks_from_prompt) == ("block", 8, True)
