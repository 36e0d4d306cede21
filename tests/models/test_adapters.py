"""Configurations into specs, and tensor names in both directions."""

import json
import math
from dataclasses import replace

import pytest
import torch

from dkv.models import ModelSpec, Transformer, load
from dkv.models.export import to_checkpoint
from dkv.models.families import FAMILIES, family_of
from dkv.models.mixture import Mixture

SPEC = ModelSpec(
    family="llada",
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    max_positions=64,
    rope_theta=10000.0,
    norm_eps=1e-5,
    mask_token_id=31,
    eos_token_id=30,
    pad_token_id=30,
)
# The fields of the public 8B and 7B checkpoints that a spec depends on.
LLADA_8B = json.loads("""
{"model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 4096, "n_layers": 32, "n_heads": 32,
"n_kv_heads": 32, "mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": 126464, "weight_tying": false,
"rope": true, "rope_full_precision": true, "rope_theta": 500000.0, "rms_norm_eps": 1e-05, "layer_norm_type": "rms",
"activation_type": "silu", "block_type": "llama", "bias_for_layer_norm": false, "include_bias": false,
"include_qkv_bias": false, "max_sequence_length": 4096}
""")
DREAM_7B = json.loads("""
{"model_type": "Dream", "architectures": ["DreamModel"], "hidden_size": 3584, "num_hidden_layers": 28,
"num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
"max_position_embeddings": 131072, "rope_theta": 1000000.0, "rms_norm_eps": 1e-06, "hidden_act": "silu",
"tie_word_embeddings": false, "use_sliding_window": false, "sliding_window": null, "rope_scaling": null}
""")


def spec_of(config: dict, **changes) -> ModelSpec:
    config = {**config, **changes}
    return family_of(config).spec(config)


def inverse_frequency(spec: ModelSpec, theta: float) -> None:
    """The rotary table turns by theta^(-2 / D) per slot at the second frequency."""
    small = replace(spec, vocab_size=8, hidden_size=8, num_layers=1, intermediate_size=8, mask_token_id=7)
    cos, sin = Transformer(replace(small, eos_token_id=None, pad_token_id=None)).rope_tables(2)
    assert torch.atan2(sin[1, 1], cos[1, 1]).item() == pytest.approx(theta ** (-2 / spec.head_dim), rel=1e-6)
    assert spec.rope_theta == theta


def test_llada_8b():
    assert spec_of(LLADA_8B) == ModelSpec(
        family="llada",
        vocab_size=126464,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        intermediate_size=12288,
        max_positions=4096,
        rope_theta=500000.0,
        norm_eps=1e-5,
        mask_token_id=126336,
        eos_token_id=126081,
        pad_token_id=126081,
    )


def test_dream_7b():
    assert spec_of(DREAM_7B) == ModelSpec(
        family="dream",
        vocab_size=152064,
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=18944,
        max_positions=131072,
        rope_theta=1000000.0,
        norm_eps=1e-6,
        mask_token_id=151666,
        eos_token_id=151643,
        pad_token_id=151643,
        qkv_bias=True,
        shifted=True,
        rope_float32=False,
    )


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "llada"}, "llada"),
        ({"model_type": "custom", "architectures": ["LLaDAModelLM"]}, "llada"),
        ({"model_type": "mmada"}, "llada"),
        ({"model_type": "Dream"}, "dream"),
        ({"architectures": ["DreamModel"]}, "dream"),
    ],
)
def test_family_of(config, name):
    assert family_of(config).name == name


@pytest.mark.parametrize(
    "config", [{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, {}, {"architectures": None}]
)
def test_unknown_family_is_named_beside_the_known(config):
    kind = config.get("model_type")
    with pytest.raises(ValueError, match=rf"model_type is {kind!r}.*llada.*LLaDAModelLM.*dream.*DreamModel"):
        family_of(config)


REFUSED = [
    (LLADA_8B, {"alibi": True}, "alibi=True; only False"),
    (LLADA_8B, {"rope": False}, "rope=False; only True"),
    (LLADA_8B, {"layer_norm_type": "default"}, "layer_norm_type='default'; only 'rms'"),
    (LLADA_8B, {"layer_norm_with_affine": False}, "layer_norm_with_affine=False; only True"),
    (LLADA_8B, {"activation_type": "swiglu"}, "activation_type='swiglu'; only 'silu'"),
    (LLADA_8B, {"block_type": "sequential"}, "block_type='sequential'; only 'llama'"),
    (LLADA_8B, {"block_group_size": 2}, "block_group_size=2; only 1"),
    (LLADA_8B, {"scale_logits": True}, "scale_logits=True; only False"),
    (LLADA_8B, {"input_emb_norm": True}, "input_emb_norm=True; only False"),
    (LLADA_8B, {"attention_layer_norm": True}, "attention_layer_norm=True; only False"),
    (LLADA_8B, {"include_bias": True, "bias_for_layer_norm": None}, "bias_for_layer_norm=True; only False"),
    (LLADA_8B, {"multi_query_attention": True}, "n_kv_heads=32.*multi_query_attention=True means 1"),
    (LLADA_8B, {"n_heads": 30}, "d_model=4096, not a multiple of n_heads=30"),
    (LLADA_8B, {"d_model": None}, "lacks 'd_model'"),
    (LLADA_8B, {"n_layers": "32"}, "n_layers='32'; a whole number"),
    (LLADA_8B, {"rms_norm_eps": 0}, "rms_norm_eps=0; a number above 0"),
    (LLADA_8B, {"mask_token_id": 126464}, "mask_token_id=126464, but the model has 126464 tokens.*correct config.json"),
    (
        LLADA_8B,
        {"vocab_size": 99, "embedding_size": None},
        "no mask_token_id, and a vocabulary of 99 has no usual one: add the id",
    ),
    (LLADA_8B, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear', factor=2.0.*only.*'default'"),
    (DREAM_7B, {"use_sliding_window": True}, "use_sliding_window=True; only False"),
    (DREAM_7B, {"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
    (DREAM_7B, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn', factor=4.0.*only.*'default'"),
    (DREAM_7B, {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention=.*only.*'default'"),
    (DREAM_7B, {"rope_scaling": 2.0}, "rope_scaling=2.0; an object or null"),
    (DREAM_7B, {"rope_theta": -1.0}, "rope_theta=-1.0; a number above 0"),
    (DREAM_7B, {"eos_token_id": 152064}, "eos_token_id=152064, but the model has 152064 tokens"),
]


@pytest.mark.parametrize(("config", "changes", "message"), REFUSED, ids=[" ".join(c) for _, c, _ in REFUSED])
def test_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        spec_of(config, **changes)


def test_optional_fields():
    assert spec_of(LLADA_8B, n_kv_heads=None, multi_query_attention=True).num_kv_heads == 1
    assert spec_of(LLADA_8B, n_kv_heads=None).num_kv_heads == 32
    assert spec_of(LLADA_8B, mlp_hidden_size=None).intermediate_size == 4 * 4096
    assert spec_of(LLADA_8B, include_qkv_bias=True).qkv_bias
    assert spec_of(LLADA_8B, include_bias=True).linear_bias
    assert not spec_of(LLADA_8B, rope_full_precision=False).rope_float32
    assert spec_of(LLADA_8B, weight_tying=True).tied_head
    assert spec_of(DREAM_7B, num_key_value_heads=None).num_kv_heads == 28
    assert spec_of(DREAM_7B, head_dim=64).head_dim == 64
    assert spec_of(DREAM_7B, tie_word_embeddings=True).tied_head
    assert spec_of(DREAM_7B, eos_token_id=[151645, 151643]).eos_token_id == 151645


def test_default_end_outside_a_small_vocabulary_is_none():
    assert spec_of(DREAM_7B, vocab_size=64, mask_token_id=63).eos_token_id is None


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_B13_rope_theta_at_top_level(family):
    config = LLADA_8B if family == "llada" else DREAM_7B
    inverse_frequency(spec_of(config, rope_theta=1e6), 1e6)


@pytest.mark.parametrize("nested", [{"rope_theta": 1e6, "rope_type": "default"}, {"rope_theta": 1e6}])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_B13_rope_theta_in_rope_parameters(family, nested):
    config = LLADA_8B if family == "llada" else DREAM_7B
    inverse_frequency(spec_of(config, rope_theta=None, rope_parameters=nested), 1e6)
    # transformers 5 reads the nested one.
    inverse_frequency(spec_of(config, rope_theta=5.0, rope_parameters=nested), 1e6)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_B13_rope_theta_absent(family):
    config = {k: v for k, v in (LLADA_8B if family == "llada" else DREAM_7B).items() if k != "rope_theta"}
    inverse_frequency(spec_of(config), 10000.0)
    inverse_frequency(spec_of(config, rope_parameters={"rope_type": "default"}), 10000.0)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_parameter_has_its_own_name(family):
    mixture = Mixture(8, 2, 16, dense_layers=(0,)) if family.is_mixture else None
    model = Transformer(replace(SPEC, qkv_bias=True, num_layers=12, mixture=mixture))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    pieces = family.pieces(shapes)
    sizes = dict.fromkeys(shapes, 0)
    for parts in pieces.values():
        for part in parts:
            sizes[part.parameter] += math.prod(part.shape)
    assert sizes == {name: math.prod(shape) for name, shape in shapes.items()}
    assert any(".11." in theirs for theirs in pieces)


@pytest.mark.parametrize(
    "changes",
    [{}, {"linear_bias": True}, {"qkv_bias": True}, {"tied_head": True}, {"rope_float32": False}, {"num_kv_heads": 1}],
    ids=lambda c: "-".join(c) or "plain",
)
def test_to_checkpoint_round_trip(changes):
    model = Transformer(replace(SPEC, **changes))
    config, state = to_checkpoint(model)
    config = json.loads(json.dumps(config))
    assert config["architectures"] == ["LLaDAModelLM"] and config["model_type"] == "llada"
    assert family_of(config).spec(config) == model.spec
    assert {t.data_ptr() for t in state.values()} == {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shifted": True}, "cannot express shifted=True, only False"),
        ({"family": "dream"}, "cannot express qkv_bias=False, only True"),
        ({"head_dim": 8}, "cannot express head_dim=8, only 4"),
        ({"qk_norm": True}, r"no place for layers.0.q_norm.weight"),
    ],
)
def test_to_checkpoint_refuses_what_the_format_lacks(changes, message):
    with pytest.raises(ValueError, match=message):
        to_checkpoint(Transformer(replace(SPEC, **changes)))


@pytest.mark.parametrize("recorded", ["llada_gqa", "dream_gqa"])
def test_to_checkpoint_gives_back_a_recorded_checkpoint(golden, recorded):
    folder, _ = golden(f"{recorded}/cases/forward_b2")[0]
    config, _ = to_checkpoint(load(folder, device="cpu", pack=False))
    recorded = json.loads((folder / "config.json").read_text())
    assert {k: v for k, v in config.items() if recorded[k] != v} == {}


def test_golden_forward(golden):
    """Logits and the input of every layer, as the published code computed them."""
    cases = golden("*/cases/forward_*")
    assert {folder.name for folder, _ in cases} == {"llada_mha", "llada_gqa", "llada_maskpred", "dream_gqa"}
    for folder, recorded in cases:
        model, hidden = load(folder, device="cpu"), []
        for layer in model.layers:
            layer.register_forward_pre_hook(lambda _, args, hidden=hidden: hidden.append(args[0]))
        model.norm.register_forward_hook(lambda _, args, out, hidden=hidden: hidden.append(out))
        mask = recorded.get("attention_mask")
        logits = model(recorded["input_ids"].long(), mask)
        real = torch.ones_like(recorded["input_ids"]).bool() if mask is None else mask.bool()
        torch.testing.assert_close(logits[real], recorded["logits"][real], atol=1e-4, rtol=0)
        assert len(hidden) == len(model.layers) + 1
        for i, found in enumerate(hidden):
            torch.testing.assert_close(found[real], recorded[f"hidden_{i}"][real], atol=1e-4, rtol=0)
