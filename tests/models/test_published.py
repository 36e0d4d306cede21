"""Configurations as the hub has them, in the forms of transformers 4 and 5, and ids that only a tokenizer knows."""

import json
from pathlib import Path

import pytest

from dkv.models import ModelSpec
from dkv.models.families import FAMILIES, family_of
from dkv.models.mixture import Mixture
from dkv.models.rotary import QueryScale, Yarn
from dkv.models.special_ids import with_token_ids

# The fields of the published files that a spec depends on, and foreign ones that it does not.
SDAR_8B = json.loads("""
{"architectures": ["SDARForCausalLM"], "model_type": "sdar", "auto_map": {"AutoModel": "modeling_sdar.SDARModel"},
"attention_bias": false, "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096, "head_dim": 128,
"intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
"max_position_embeddings": 32768, "max_window_layers": 36, "rms_norm_eps": 1e-06, "rope_scaling": null,
"rope_theta": 1000000, "sliding_window": null, "use_sliding_window": false, "tie_word_embeddings": false,
"vocab_size": 151936, "block_size": 4, "mask_token_id": 151669, "eos_token_id": 151643, "torch_dtype": "bfloat16",
"fuse_cross_entropy": true, "debug": false, "ep_size": 1, "micro_forward": false, "use_deepep": false,
"skip_checkpoint": false, "attn_implementation": "flash_attention_2"}
""")
SDAR_4B = {**SDAR_8B, "hidden_size": 2560, "intermediate_size": 9728}
FAST_7B = json.loads("""
{"architectures": ["Fast_dLLM_QwenForCausalLM"], "model_type": "Fast_dLLM_Qwen", "hidden_act": "silu", "bd_size": 32,
"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
"num_key_value_heads": 4, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
"tie_word_embeddings": false, "use_sliding_window": false, "sliding_window": null, "vocab_size": 152064,
"eos_token_id": 151645}
""")
NEMOTRON_8B = json.loads("""
{"architectures": ["NemotronLabsDiffusionModel"], "model_type": "nemotron_labs_diffusion", "hidden_act": "silu",
"attention_bias": false, "mlp_bias": false, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 34,
"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072, "rms_norm_eps": 1e-05,
"max_position_embeddings": 262144, "sliding_window": null, "tie_word_embeddings": false, "block_size": 32,
"mask_token_id": 100, "eos_token_id": 11, "dlm_paradigm": "bidirectional",
"rope_parameters": {"rope_type": "yarn", "type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "beta_fast": 32.0,
"beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
"original_max_position_embeddings": 16384}}
""")
A2D = json.loads("""
{"architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3", "hidden_act": "silu", "attention_bias": false,
"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-06,
"rope_theta": 1000000, "rope_scaling": null, "tie_word_embeddings": true, "use_sliding_window": false,
"layer_types": ["full_attention", "full_attention"], "vocab_size": 151936, "mask_token_id": 151669}
""")
DIFFCODER = json.loads("""
{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": false,
"mlp_bias": false, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
"num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-06, "rope_theta": 500000.0,
"rope_scaling": null, "tie_word_embeddings": false, "vocab_size": 155136}
""")
ILLADA = json.loads("""
{"architectures": ["LLaDAModelLM"], "model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32,
"n_kv_heads": 8, "mlp_hidden_size": 14336, "vocab_size": 155136, "embedding_size": 155136, "weight_tying": true,
"rope": true, "rope_theta": 500000.0, "rms_norm_eps": 1e-05, "layer_norm_type": "rms", "activation_type": "silu",
"block_type": "llama", "max_sequence_length": 8192}
""")
LLADA2_MINI = json.loads("""
{"architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe_veomni", "hidden_act": "silu", "hidden_size": 2048,
"num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "rotary_dim": 64,
"intermediate_size": 5120, "first_k_dense_replace": 1, "moe_intermediate_size": 512, "num_experts": 256,
"num_experts_per_tok": 8, "num_shared_experts": 1, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
"score_function": "sigmoid", "norm_topk_prob": true, "router_dtype": "fp32", "moe_router_enable_expert_bias": true,
"partial_rotary_factor": 0.5, "rope_theta": 600000, "rope_scaling": null, "use_qkv_bias": false, "use_bias": false,
"rms_norm_eps": 1e-06, "vocab_size": 157184, "tie_word_embeddings": false, "max_position_embeddings": 16384,
"sliding_window": 4096, "use_sliding_window": false, "pad_token_id": 156892, "embedding_dropout": 0.0}
""")
LLADA2_FLASH = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 9216}
LLADA2_FLASH |= {"moe_intermediate_size": 1024, "model_type": "llada21_moe", "max_position_embeddings": 32768}
LLADA_MOE = json.loads("""
{"architectures": ["LLaDAMoEModel"], "model_type": "lladamoe", "hidden_act": "silu", "hidden_size": 2048,
"num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": null, "dense_intermediate_size": 8192,
"expert_intermediate_size": 1024, "shared_expert_intermediate_size": null, "num_experts": 64, "num_experts_per_tok": 8,
"moe_layer_freq": [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], "moe_router_score_function": "softmax",
"moe_router_enable_expert_bias": false, "routed_scaling_factor": 1, "router_num_group": null,
"router_topk_group": null, "norm_topk_prob": true, "qk_layernorm": true, "clip_qkv": null, "partial_rotary_factor": 1,
"rope_theta": 50000, "rope_scaling": null, "rms_norm_eps": 1e-05, "attention_bias": false, "vocab_size": 157184,
"max_position_embeddings": 8192, "tie_word_embeddings": false}
""")
SDAR_30B = {"architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe", "hidden_size": 2048, "num_experts": 128}
SDAR_30B |= {"num_hidden_layers": 48, "num_key_value_heads": 4, "intermediate_size": 6144, "num_experts_per_tok": 8}
SDAR_30B |= {"moe_intermediate_size": 768, "norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1}
SDAR_30B = {**SDAR_8B, **SDAR_30B}
LLADA2_IDS = {"mask_token_id": 156895, "eos_token_id": 156892, "pad_token_id": 156892}
LLADA2_ROUTER = {"score": "sigmoid", "groups": 8, "top_groups": 4, "renormalise": True, "scaling": 2.5}
LLADA2_ROUTER |= {"bias": "choice", "dense_layers": (0,)}
SHARED = {"head_dim": 128, "rope_float32": False}
EXPECTED = {
    "sdar": (
        SDAR_8B,
        {**SHARED, "vocab_size": 151936, "hidden_size": 4096, "num_layers": 36, "num_heads": 32, "num_kv_heads": 8}
        | {"intermediate_size": 12288, "max_positions": 32768, "rope_theta": 1e6, "norm_eps": 1e-6, "qk_norm": True}
        | {"mask_token_id": 151669, "eos_token_id": 151643, "pad_token_id": 151643, "eot_token_id": 151645}
        | {"attention": "block", "block_length": 4},
    ),
    "fast_dllm_v2": (
        FAST_7B,
        {**SHARED, "vocab_size": 152064, "hidden_size": 3584, "num_layers": 28, "num_heads": 28, "num_kv_heads": 4}
        | {"intermediate_size": 18944, "max_positions": 32768, "rope_theta": 1e6, "norm_eps": 1e-6, "qkv_bias": True}
        | {"mask_token_id": 151665, "eos_token_id": 151645, "pad_token_id": 151645, "shifted": True, "seeded": True}
        | {"attention": "block", "block_length": 32},
    ),
    "nemotron": (
        NEMOTRON_8B,
        {**SHARED, "vocab_size": 131072, "hidden_size": 4096, "num_layers": 34, "num_heads": 32, "num_kv_heads": 8}
        | {"intermediate_size": 14336, "max_positions": 262144, "rope_theta": 1e6, "norm_eps": 1e-5}
        | {"mask_token_id": 100, "eos_token_id": 11, "pad_token_id": 11, "attention": "prefix_causal"}
        | {"block_length": 32, "blocks_from_prompt": True, "seeded": True}
        | {"rope": Yarn(16.0, 16384), "query_scale": QueryScale(0.1, 16384)},
    ),
    "a2d-qwen3": (
        A2D,
        {**SHARED, "vocab_size": 151936, "hidden_size": 1024, "num_layers": 28, "num_heads": 16, "num_kv_heads": 8}
        | {"intermediate_size": 3072, "max_positions": 40960, "rope_theta": 1e6, "norm_eps": 1e-6, "qk_norm": True}
        | {"mask_token_id": 151669, "tied_head": True},
    ),
    "stable_diffcoder": (
        DIFFCODER,
        {**SHARED, "vocab_size": 155136, "hidden_size": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8}
        | {"intermediate_size": 14336, "max_positions": 8192, "rope_theta": 5e5, "norm_eps": 1e-6}
        | {"mask_token_id": 5, "eos_token_id": 2, "pad_token_id": 1, "attention": "block", "block_length": 4},
    ),
    "llada2": (
        LLADA2_MINI,
        {**SHARED, "vocab_size": 157184, "hidden_size": 2048, "num_layers": 20, "num_heads": 16, "num_kv_heads": 4}
        | {"intermediate_size": 5120, "max_positions": 16384, "rope_theta": 6e5, "norm_eps": 1e-6, "qk_norm": True}
        | {**LLADA2_IDS, "attention": "block", "block_length": 32, "rotary_dim": 64}
        | {"mixture": Mixture(256, 8, 512, **LLADA2_ROUTER, shared_width=512)},
    ),
    "llada_moe": (
        LLADA_MOE,
        {**SHARED, "vocab_size": 157184, "hidden_size": 2048, "num_layers": 16, "num_heads": 16, "num_kv_heads": 16}
        | {"intermediate_size": 8192, "max_positions": 8192, "rope_theta": 5e4, "norm_eps": 1e-5, "qk_norm": True}
        | {**LLADA2_IDS, "mixture": Mixture(64, 8, 1024)},
    ),
    "sdar_moe": (
        SDAR_30B,
        {**SHARED, "vocab_size": 151936, "hidden_size": 2048, "num_layers": 48, "num_heads": 32, "num_kv_heads": 4}
        | {"intermediate_size": 6144, "max_positions": 32768, "rope_theta": 1e6, "norm_eps": 1e-6, "qk_norm": True}
        | {"mask_token_id": 151669, "eos_token_id": 151643, "pad_token_id": 151643, "eot_token_id": 151645}
        | {"attention": "block", "block_length": 4, "mixture": Mixture(128, 8, 768, renormalise=True)},
    ),
    "llada": (
        ILLADA,
        {"vocab_size": 155136, "hidden_size": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8}
        | {"intermediate_size": 14336, "max_positions": 8192, "rope_theta": 5e5, "norm_eps": 1e-5, "head_dim": 128}
        | {"mask_token_id": 5, "eos_token_id": 2, "pad_token_id": 1, "tied_head": True},
    ),
}


def read(family: str, **changes) -> ModelSpec:
    return FAMILIES[family].spec({**EXPECTED[family][0], **changes})


@pytest.mark.parametrize(("family", "case"), EXPECTED.items(), ids=EXPECTED)
def test_published_files(family, case):
    config, expected = case
    named = family if FAMILIES[family].unmarked else None
    assert family_of(config, named).spec(config) == ModelSpec(family, **expected)


def test_smaller_siblings():
    assert read("sdar", **SDAR_4B).hidden_size == 2560 and read("sdar", **SDAR_4B).head_dim == 128
    assert read("sdar", tie_word_embeddings=True, block_size=16).block_length == 16
    small = read("fast_dllm_v2", vocab_size=151936, tie_word_embeddings=True, mask_token_id=None)
    assert (small.mask_token_id, small.tied_head) == (151665, True)
    base = {**NEMOTRON_8B["rope_parameters"], "factor": 0.25}
    assert read("nemotron", max_position_embeddings=4096, rope_parameters=base).rope == Yarn(0.25, 16384)
    open_factor = {**base, "factor": None}
    assert read("nemotron", max_position_embeddings=4096, rope_parameters=open_factor).rope == Yarn(0.25, 16384)


def test_larger_and_other_mixtures():
    flash = read("llada2", **LLADA2_FLASH)
    assert flash.mixture == Mixture(256, 8, 1024, **LLADA2_ROUTER, shared_width=1024) and flash.head_dim == 128
    assert family_of({**LLADA2_MINI, **LLADA2_FLASH, "architectures": None}).name == "llada2"
    assert read("llada2", use_qk_norm=False).qk_norm is False and read("llada2", use_bias=None).output_bias
    assert read("llada2", num_shared_experts=None, num_experts_per_tok=1).mixture.shared_width == 0
    # A single expert keeps its raw score.
    assert read("llada2", num_experts_per_tok=1).mixture.renormalise is False
    found = read("llada_moe", moe_layer_freq=[0, 1] * 8, shared_expert_intermediate_size=512, clip_qkv=8.0)
    assert (found.mixture.dense_layers, found.mixture.shared_width) == (tuple(range(0, 16, 2)), 512)
    assert found.clip_qkv == 8 and read("llada_moe", moe_router_enable_expert_bias=True).mixture.bias == "weights"
    assert read("llada_moe", dense_intermediate_size=None).intermediate_size == 1024
    found = read("sdar_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[1])
    assert found.mixture.dense_layers == (0, 1, 2, 4) and not read("sdar_moe", norm_topk_prob=None).mixture.renormalise


@pytest.mark.parametrize("family", [name for name in EXPECTED if name not in ("nemotron", "llada")])
def test_the_form_of_transformers_5(family):
    """`rope_parameters` in place of `rope_theta` and `rope_scaling`, `dtype` in place of `torch_dtype`."""
    config = {k: v for k, v in EXPECTED[family][0].items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    theta = EXPECTED[family][0]["rope_theta"]
    form = {"dtype": "bfloat16", "rope_parameters": {"rope_theta": theta, "rope_type": "default"}}
    assert FAMILIES[family].spec({**config, **form}) == read(family)
    with pytest.raises(ValueError, match="lacks 'rope_theta'"):
        FAMILIES[family].spec(config)


def test_nemotron_in_the_form_of_transformers_4():
    nested = dict(NEMOTRON_8B["rope_parameters"])
    theta = nested.pop("rope_theta")
    assert read("nemotron", rope_parameters=None, rope_scaling=nested, rope_theta=theta) == read("nemotron")


def test_biases_of_attention():
    for family, both in {"sdar": True, "a2d-qwen3": True, "stable_diffcoder": True}.items():
        spec = read(family, attention_bias=both)
        assert (spec.qkv_bias, spec.output_bias, spec.linear_bias) == (True, True, False)


YARN = NEMOTRON_8B["rope_parameters"]
REFUSED = [
    ("sdar", {"use_sliding_window": True}, "use_sliding_window=True; only False"),
    ("sdar", {"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
    ("sdar", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*only 'full_attention'"),
    ("sdar", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn', factor=4.0.*only.*'default'"),
    ("sdar", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; only 1 is implemented"),
    ("sdar", {"block_size": 0}, "block_size=0; a whole number of at least 1"),
    ("sdar", {"block_size": "4"}, "block_size='4'; a whole number"),
    ("sdar", {"head_dim": 127}, "head_dim must be even"),
    ("sdar", {"attention_bias": 1}, "attention_bias=1; true or false"),
    ("sdar", {"rope_theta": None}, "lacks 'rope_theta'"),
    ("sdar", {"vocab_size": 151937, "mask_token_id": None}, "no mask_token_id, and a vocabulary of 151937"),
    ("sdar", {"mask_token_id": 151936}, "mask_token_id=151936, but the model has 151936 tokens"),
    ("fast_dllm_v2", {"bd_size": -1}, "bd_size=-1; a whole number"),
    ("fast_dllm_v2", {"num_attention_heads": 27}, "hidden_size=3584, not a multiple of num_attention_heads=27"),
    ("a2d-qwen3", {"mask_token_id": None}, r"no mask_token_id, .* 151936 has no usual one: .*mask_token_id="),
    ("stable_diffcoder", {"mlp_bias": True}, "mlp_bias=True; only False"),
    ("stable_diffcoder", {"max_position_embeddings": None}, "lacks 'max_position_embeddings'"),
    ("stable_diffcoder", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "changes its rotary embedding"),
    ("llada2", {"score_function": "softmax"}, "score_function='softmax'; only 'sigmoid'"),
    ("llada2", {"norm_topk_prob": False}, "norm_topk_prob=False; only True"),
    ("llada2", {"router_dtype": "bf16"}, "router_dtype='bf16'; only 'fp32'"),
    ("llada2", {"moe_router_enable_expert_bias": False}, "moe_router_enable_expert_bias=False; only True"),
    ("llada2", {"n_group": None}, "lacks 'n_group'"),
    ("llada2", {"n_group": 256}, "256 experts are not 256 groups of one size, and of at least two"),
    ("llada2", {"topk_group": 9}, r"top_groups \(9\) must be at most groups \(8\)"),
    ("llada2", {"num_experts_per_tok": 129}, r"chosen \(129\) must be at most the 128 experts of 4 of 8 groups"),
    ("llada2", {"first_k_dense_replace": 21}, "first_k_dense_replace=21; a whole number in 0..20"),
    ("llada2", {"num_shared_experts": -1}, "num_shared_experts=-1; a whole number or null"),
    ("llada2", {"partial_rotary_factor": None}, "lacks 'partial_rotary_factor'"),
    ("llada2", {"partial_rotary_factor": 1.5}, "rotary_dim must be even and in 2..128"),
    ("llada2", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "changes its rotary embedding"),
    ("llada2", {"model_type": "llada22_moe"}, r"LLaDA2.2 \(llada22_moe\), which dkv does not load"),
    ("llada2", {"_name_or_path": "inclusionAI/LLaDA2.2-flash"}, r"LLaDA2.2 \(inclusionAI/LLaDA2.2-flash\)"),
    ("llada2", {"delete_token_id": 156897}, r"LLaDA2.2 \(delete_token_id\)"),
    ("llada_moe", {"moe_router_score_function": "sigmoid"}, "moe_router_score_function='sigmoid'; only 'softmax'"),
    ("llada_moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5; only 1"),
    ("llada_moe", {"router_num_group": 8}, "router_num_group=8; only None"),
    ("llada_moe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; only 1"),
    ("llada_moe", {"moe_layer_freq": [1, 0]}, r"moe_layer_freq=\[1, 0\]; a list of 16 numbers, 0 or 1"),
    ("llada_moe", {"moe_layer_freq": [0] * 16, "dense_intermediate_size": None}, "lacks 'dense_intermediate_size'"),
    ("llada_moe", {"clip_qkv": -1.0}, "clip_qkv=-1.0; a number above 0"),
    ("sdar_moe", {"mlp_only_layers": [48]}, r"mlp_only_layers=\[48\]; a list of numbers in 0..47"),
    ("sdar_moe", {"num_experts": None}, "lacks 'num_experts'"),
    ("sdar_moe", {"num_experts_per_tok": 129}, r"chosen \(129\) must be at most the 128 experts"),
    ("nemotron", {"sliding_window": 4096}, "sliding_window=4096; only None"),
    ("nemotron", {"attention_bias": True}, "attention_bias=True; only False"),
    ("nemotron", {"rope_parameters": None}, r"rope_type=\[\]; only 'yarn'"),
    ("nemotron", {"rope_parameters": {**YARN, "rope_type": "longrope"}}, "longrope.*only 'yarn'"),
    ("nemotron", {"rope_parameters": {**YARN, "mscale": 0.7}}, r"mscale=0.7; only mscale_all_dim \(1.0\)"),
    ("nemotron", {"rope_parameters": {**YARN, "mscale": None}}, "lacks 'mscale'"),
    ("nemotron", {"rope_parameters": {**YARN, "truncate": False}}, "truncate=False; only True"),
    ("nemotron", {"rope_parameters": {**YARN, "attention_factor": 1.2}}, "attention_factor=1.2; only 1.0"),
    ("nemotron", {"rope_parameters": {**YARN, "short_factor": [1.0]}}, r"short_factor=\[1.0\] in its rope_parameters"),
    ("nemotron", {"rope_parameters": {**YARN, "original_max_position_embeddings": None}}, "lacks 'original_max_pos"),
    ("nemotron", {"rope_parameters": {**YARN, "llama_4_scaling_beta": -0.1}}, "llama_4_scaling_beta=-0.1; a number"),
    ("nemotron", {"rope_parameters": {**YARN, "beta_fast": "32"}}, "beta_fast='32'; a number above 0"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED, ids=[f"{f} {c}"[:60] for f, c, _ in REFUSED])
def test_refused(family, changes, message):
    with pytest.raises(ValueError, match=message):
        read(family, **changes)


def write(folder: Path, **files) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


TOKEN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
ADDED = {"|<MASK>|": 70, "<|im_end|>": 71}
DECODER = {"70": {"content": "<|mask|>", **TOKEN}, "71": {"content": "<|im_end|>", **TOKEN}}
ALL_IN_ONE = {"added_tokens": [{"id": 70, "content": "[MASK]", **TOKEN}, {"id": 71, "content": "<end>", **TOKEN}]}
FOLDERS = {
    "added_tokens.json": {"added_tokens": ADDED, "tokenizer_config": {"eos_token": "<|im_end|>"}},
    "tokenizer_config.json": {
        "tokenizer_config": {"added_tokens_decoder": DECODER, "mask_token": "<|mask|>", "eos_token": "<|im_end|>"}
    },
    "without the name of the mask": {
        "tokenizer_config": {
            "added_tokens_decoder": DECODER,
            "mask_token": None,
            "eos_token": {"content": "<|im_end|>"},
        }
    },
    "tokenizer.json": {"tokenizer": ALL_IN_ONE, "special_tokens_map": {"mask_token": "[MASK]", "eos_token": "<end>"}},
}


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
def test_ids_from_the_tokenizer(tmp_path, files):
    write(tmp_path, **files)
    found = with_token_ids({"vocab_size": 80}, tmp_path)
    assert found == {"vocab_size": 80, "mask_token_id": 70, "eos_token_id": 71}
    # The configuration counts before it, and what lies outside the vocabulary is no token of the model.
    stated = {"vocab_size": 80, "mask_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": 6}
    assert with_token_ids(stated, tmp_path) == stated
    assert with_token_ids({"vocab_size": 71}, tmp_path) == {"vocab_size": 71, "mask_token_id": 70}


def test_ids_that_no_file_has(tmp_path):
    assert with_token_ids({"vocab_size": 80}, tmp_path) == {"vocab_size": 80}
    write(tmp_path, tokenizer_config={"mask_token": "<other>", "added_tokens_decoder": DECODER})
    assert with_token_ids({"vocab_size": 80}, tmp_path) == {"vocab_size": 80}
    write(
        tmp_path, tokenizer_config={"mask_token": 5, "added_tokens_decoder": {"x": {}, "7": 3}}, added_tokens={"a": "b"}
    )
    assert with_token_ids({"vocab_size": 80}, tmp_path) == {"vocab_size": 80}


def test_the_tokenizer_counts_before_the_usual_ids(tmp_path):
    write(tmp_path, added_tokens={"|<MASK>|": 9})
    config = with_token_ids({**FAST_7B, "eos_token_id": None}, tmp_path)
    spec = FAMILIES["fast_dllm_v2"].spec(config)
    assert (spec.mask_token_id, spec.eos_token_id) == (9, 151645)
