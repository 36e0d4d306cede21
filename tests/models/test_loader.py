"""Loading folders, and every way in which they can be wrong."""

import json
import struct

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from dkv.core.kv_cache import KVCache
from dkv.models import Transformer, folders, load, loader
from dkv.models.families import FAMILIES


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_B12_weights_equal_the_file_without_remote_code(small, family):
    checkpoint = small(family)
    (checkpoint.folder / "modeling.py").write_text("raise RuntimeError('remote code was run')")
    model = load(checkpoint.write(auto_map={"AutoModel": "modeling.Model"}), device="cpu", pack=False)
    pieces = FAMILIES[family].pieces({name: tuple(p.shape) for name, p in weights(model).items()})
    assert sorted(pieces) == sorted(checkpoint.tensors)
    assert all(torch.equal(weights(model)[part.parameter], checkpoint.tensors[n]) for n, (part,) in pieces.items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model(torch.tensor([[1, 2, 63]])).shape == (1, 3, 64)


def test_B11_buffers_live_where_their_keys_do():
    buffer = KVCache(1, 8)
    here = torch.zeros(1, 2, 2, 4, dtype=torch.float64)
    for index, like in enumerate((here, here.to("meta").half())):
        for x in buffer.layer(index, like=like):
            assert x.numbers.device == like.device and x.numbers.dtype == like.dtype


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "torch.bfloat16"}, torch.bfloat16),
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
        ({"torch_dtype": "bfloat16", "dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": "auto"}, torch.float16),
        ({"torch_dtype": "auto"}, torch.float16),
        # The documented default: half precision becomes float32 on a CPU.
        ({}, torch.float32),
    ],
    ids=str,
)
def test_B16_dtype_and_its_older_name(small, asked, expected):
    model = load(small(dtype=torch.float16).folder, device="cpu", **asked)
    assert {p.dtype for p in model.parameters()} == {expected}


def test_B16_default_keeps_double(small):
    assert load(small(dtype=torch.float64).folder, device="cpu").dtype == torch.float64


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"dtype": torch.float16, "torch_dtype": torch.bfloat16}, "disagree"),
        ({"dtype": "auto", "torch_dtype": "float32"}, "disagree"),
        ({"dtype": "bf16"}, "dtype='bf16' is not supported.*bfloat16"),
        ({"torch_dtype": torch.int8}, "torch_dtype=torch.int8 is not supported"),
        ({"device": "cuda:99"}, "device='cuda:99' cannot be used"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_the_folder_is_read(asked, message):
    with pytest.raises(ValueError, match=message):
        load("./nowhere", **asked)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_B22_tables_larger_than_the_vocabulary(small, family):
    checkpoint = small(family, **({"embedding_size": 72} if family == "llada" else {}))
    if family == "dream":
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            checkpoint.tensors[name] = torch.randn(72, 16)
        checkpoint.write()
    model = load(checkpoint.folder, device="cpu")
    assert model.spec.vocab_size == 72 and model(torch.tensor([[1, 63]])).shape[-1] == 72


def test_B22_tables_of_different_sizes_are_refused(small):
    checkpoint = small("dream")
    checkpoint.tensors["lm_head.weight"] = torch.randn(72, 16)
    with pytest.raises(ValueError, match=r"lm_head.weight in .*model.safetensors has shape \[72, 16\].*\[64, 16\]"):
        load(checkpoint.write(), device="cpu")


def test_shards_equal_one_file(small):
    checkpoint = small()
    whole = weights(load(checkpoint.folder, device="cpu", pack=False))
    checkpoint.shard()
    sharded = weights(load(checkpoint.folder, device="cpu", pack=False))
    assert sharded.keys() == whole.keys() and all(torch.equal(sharded[n], whole[n]) for n in whole)


def test_tied_head(small):
    model = load(small("dream", tie_word_embeddings=True).folder, device="cpu")
    assert model.head.weight is model.embed.weight


def test_tensors_decide_what_the_configuration_leaves_open(small):
    assert not load(small("llada").write(weight_tying=None), device="cpu").spec.tied_head
    assert load(small("dream", tie_word_embeddings=True).write(tie_word_embeddings=None), device="cpu").spec.tied_head


def test_rotary_frequencies_in_the_file_are_ignored(small):
    checkpoint = small("dream")
    checkpoint.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    load(checkpoint.write(), device="cpu")


def test_token_ids_from_generation_config(small):
    checkpoint = small("dream", eos_token_id=None)
    (checkpoint.folder / "generation_config.json").write_text('{"eos_token_id": 5, "mask_token_id": 6}')
    spec = load(checkpoint.folder, device="cpu").spec
    assert (spec.eos_token_id, spec.mask_token_id) == (5, 63)


def test_bundled_name_wins_over_a_local_folder(small, tmp_path, monkeypatch):
    checkpoint = small()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(folders.BUNDLED, "tiny", checkpoint.folder)
    (tmp_path / "tiny").mkdir()
    assert load("tiny", device="cpu").spec.hidden_size == 16
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        load("./tiny")


def test_hub_id(small, monkeypatch):
    folder = small().folder
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.update(id=a, **k) or str(folder))
    assert load("some-org/some-model", device="cpu").spec.family == "llada"
    assert asked["id"] == ("some-org/some-model",)
    assert not any("py" in pattern or "bin" in pattern for pattern in asked["allow_patterns"])


def test_hub_out_of_reach(monkeypatch):
    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"no connection.*pass a local folder.*hf download some-org/some-model"):
        load("some-org/some-model")


def test_folder_errors(small, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.*hub id.*tiny"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no folder nowhere.*hub id.*tiny"):
        load("nowhere")
    with pytest.raises(ValueError, match="is a file: pass the folder"):
        load(small().folder / "config.json")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "config.json is missing: pass a folder"),
        ("{", ValueError, "config.json is not valid JSON"),
        ("[1]", ValueError, "config.json holds a JSON list, not an object"),
        ('{"model_type": "gpt2"}', ValueError, "unknown model family: model_type is 'gpt2'"),
        ('{"model_type": "llada", "quantization_config": {}}', ValueError, "quantised checkpoints are not read"),
    ],
)
def test_config_errors(small, content, error, message):
    path = small().folder / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(error, match=message):
        load(path.parent)


def test_mask_id_outside_the_vocabulary(small):
    with pytest.raises(ValueError, match=r"mask_token_id=64, but the model has 64 tokens: correct config.json"):
        load(small().write(mask_token_id=64))


def test_no_safetensors(small):
    folder = small().folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        load(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin but no model.safetensors.*convert"):
        load(folder)


def test_truncated_weights(small):
    path = small().folder / "model.safetensors"
    content = path.read_bytes()
    header = struct.unpack("<Q", content[:8])[0]
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"truncated: its header promises {len(content)} bytes, it has"):
        load(path.parent)
    for size in (0, 7, 8, header):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=rf"model.safetensors \({size} bytes\) is truncated or not a safetensors"):
            load(path.parent)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        struct.pack("<Q", 4) + b"[1]!",
        struct.pack("<Q", 12) + b'{"a": [1,2]}',
    ],
    ids=["pointer", "json", "fields"],
)
def test_weights_that_are_no_safetensors(small, content):
    path = small().folder / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not a safetensors file.*fetch the file again"):
        load(path.parent)


def test_header_that_only_the_library_refuses(small):
    path = small().folder / "model.safetensors"
    content = path.read_bytes()
    # What it says of itself must be text.
    path.write_bytes(content.replace(b'"format":"pt"', b'"format":2222'))
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read \(.*\): fetch the file again"):
        load(path.parent)


def test_shard_errors(small):
    index = small().shard()
    content = json.loads(index.read_text())
    places = content["weight_map"]
    name, shard = next(iter(places.items()))
    other = next(s for s in places.values() if s != shard)
    index.write_text(json.dumps({"weight_map": {**places, name: other}}))
    with pytest.raises(ValueError, match=f"promises tensors that the shards lack.*{name} in {other}"):
        load(index.parent)
    for broken in ({}, {"weight_map": {"a": 1}}):
        index.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="has no weight_map"):
            load(index.parent)
    index.write_text(json.dumps(content))
    (index.parent / shard).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks shards that .*index.json lists \({shard}\)"):
        load(index.parent)


def test_missing_tensor(small):
    checkpoint = small()
    del checkpoint.tensors["model.transformer.blocks.1.q_proj.weight"]
    with pytest.raises(ValueError, match=r"lacks tensors.*blocks.1.q_proj.weight.*belong together"):
        load(checkpoint.write())


def test_names_of_another_family(small):
    checkpoint = small("dream")
    checkpoint.config = small("llada").config
    with pytest.raises(ValueError, match=r"lacks tensors.*: model.transformer.wte.weight.* and 17 more; found lm_head"):
        load(checkpoint.write())


def test_unexpected_tensor(small):
    checkpoint = small()
    checkpoint.tensors["model.transformer.blocks.2.q_proj.weight"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"model.safetensors has unexpected tensors: .*blocks.2.q_proj.*2 layers"):
        load(checkpoint.write())
    with pytest.raises(ValueError, match=r"unexpected tensors: lm_head.weight.*a tied head"):
        load(small("dream").write(tie_word_embeddings=True))


def test_shape_mismatch(small):
    checkpoint = small()
    name = "model.transformer.blocks.0.k_proj.weight"
    checkpoint.tensors[name] = torch.ones(16, 16)
    with pytest.raises(ValueError, match=rf"{name} in .*model.safetensors has shape \[16, 16\].*asks for \[8, 16\]"):
        load(checkpoint.write())


def test_stored_integers_are_refused(small):
    checkpoint = small()
    checkpoint.tensors["model.transformer.wte.weight"] = torch.ones(64, 16, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"wte.weight in .*model.safetensors is stored as I8; only F16, BF16"):
        load(checkpoint.write())


def test_no_tensor_is_read_before_the_checks(small, monkeypatch):
    monkeypatch.setattr(loader, "safe_open", lambda *a, **k: pytest.fail("a tensor was read"))
    checkpoint = small()
    checkpoint.tensors["surplus"] = torch.ones(1)
    with pytest.raises(ValueError, match="unexpected"):
        load(checkpoint.write())
