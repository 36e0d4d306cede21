"""Configurations that ask for the impossible, field by field, before anything is built."""

import json
from types import SimpleNamespace

import pytest
import torch

from dkv.models import load, skeleton, wrap
from dkv.models.families import family_of

# What a field may hold -> values of another kind, or with which nothing can be computed.
COUNTS = {
    "llada": [
        "d_model",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "mlp_hidden_size",
        "vocab_size",
        "embedding_size",
        "max_sequence_length",
        "mlp_ratio",
    ],
    "dream": [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "head_dim",
    ],
}
DECODERS = ("sdar", "a2d-llama", "nemotron")
COUNTS |= {family: [*COUNTS["dream"], "block_size"] for family in DECODERS}
NUMBERS = {"llada": ("rope_theta", "rms_norm_eps"), "dream": ("rope_theta", "rms_norm_eps")}
NUMBERS |= {family: ("rms_norm_eps",) if family == "nemotron" else NUMBERS["dream"] for family in DECODERS}
FLAGS = {
    "llada": [
        "rope",
        "alibi",
        "layer_norm_with_affine",
        "bias_for_layer_norm",
        "attention_layer_norm",
        "input_emb_norm",
        "scale_logits",
        "include_bias",
        "include_qkv_bias",
        "weight_tying",
        "rope_full_precision",
        "multi_query_attention",
    ],
    "dream": ["use_sliding_window", "tie_word_embeddings"],
}
FLAGS |= {
    "sdar": [*FLAGS["dream"], "attention_bias"],
    "a2d-llama": ["tie_word_embeddings", "attention_bias", "mlp_bias"],
}
FLAGS |= {"nemotron": FLAGS["a2d-llama"]}
IDS = {family: ["mask_token_id", "eos_token_id", "pad_token_id"] for family in COUNTS}
WORDS = {"llada": ["block_type", "activation_type", "layer_norm_type"]}
WORDS |= {family: ["hidden_act"] for family in ("dream", *DECODERS)}
NO_NUMBER = ["7", "", [], {}, True, False]
BAD = [
    (COUNTS, [*NO_NUMBER, 0, -1, 2.0, 1e30, 10**30, 10**400, 2**31, float("inf"), float("nan")]),
    (NUMBERS, [*NO_NUMBER, 0, -1.0, float("inf"), -float("inf"), float("nan"), 10**400, 1e39, 1e-46, [1.0]]),
    (FLAGS, ["false", "true", "", 0, 1, 0.0, 2, [], {}, [False]]),
    (
        IDS,
        ["7", True, -1, 64, 10**30, 2.0, float("nan"), float("inf"), {}, [63, "7"], [63, True], [63, 64], [[63]], [-1]],
    ),
    (WORDS, [True, 1, [], {}, "x", ["silu"]]),
]
CASES = [
    (family, field, value) for kind, values in BAD for family in kind for field in kind[family] for value in values
]


@pytest.mark.parametrize("family", COUNTS)
def test_every_field_refuses_what_it_cannot_be(small, family, monkeypatch):
    """The file as a whole, so that what the tensors say does not hide it."""
    checkpoint = small(family)
    monkeypatch.setattr(skeleton, "Transformer", lambda spec: pytest.fail("a network was built"))
    for _, field, value in (case for case in CASES if case[0] == family):
        (checkpoint.folder / "config.json").write_text(json.dumps({**checkpoint.config, field: value}))
        try:
            load(checkpoint.folder)
        except ValueError as error:
            assert f"{field}=" in str(error) or "needs" in str(error), (field, value, str(error))
        else:
            pytest.fail(f"{field}={value!r} was taken")


@pytest.mark.parametrize("part", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_every_nested_field(small, family, part):
    config = small(family).config
    for value in [*NO_NUMBER[:2], True, [], 2.0]:
        with pytest.raises(ValueError, match=f"{part}="):
            family_of(config).spec({**config, part: value})
    for inner in ({"rope_type": ["a"]}, {"rope_type": {}}, {"type": 5}, {"rope_type": "yarn"}, {"factor": 2.0}):
        with pytest.raises(ValueError, match="changes its rotary embedding"):
            family_of(config).spec({**config, part: inner})
    for theta in ("1e6", True, 0, float("inf"), float("nan"), [1.0]):
        with pytest.raises(ValueError, match="rope_theta="):
            family_of(config).spec({**config, part: {"rope_theta": theta}})


ABSURD = [
    ("llada", {"n_layers": 10**9}, "21 tensors are not 1000000000 layers"),
    ("dream", {"num_hidden_layers": 2**31 - 1}, "tensors are not 2147483647 layers"),
    ("llada", {"d_model": 2**30}, "d_model=1073741824, but no tensor of .* is longer than 64"),
    ("llada", {"mlp_hidden_size": 2**30}, "mlp_hidden_size=1073741824, but no tensor"),
    ("llada", {"mlp_hidden_size": None, "mlp_ratio": 2**20}, "intermediate_size=16777216, but no tensor"),
    ("llada", {"embedding_size": 2**30}, "embedding_size=1073741824, but no tensor"),
    ("dream", {"vocab_size": 2**30}, "vocab_size=1073741824, but no tensor"),
    ("dream", {"head_dim": 2**30}, "num_heads x head_dim=4294967296, but no tensor"),
    ("dream", {"num_attention_heads": 2**29, "hidden_size": 2**30}, "hidden_size=1073741824, but no tensor"),
]


@pytest.mark.parametrize(("family", "changes", "message"), ABSURD, ids=[str(c) for _, c, _ in ABSURD])
def test_more_than_the_tensors_provide_is_refused_before_it_is_built(small, family, changes, message, monkeypatch):
    checkpoint = small(family)
    checkpoint.write(**changes)
    monkeypatch.setattr(skeleton, "Transformer", lambda spec: pytest.fail("a network was built"))
    with pytest.raises(ValueError, match=rf"{message}.*belong together"):
        load(checkpoint.folder)


def test_a_model_in_memory_is_measured_alike(small):
    checkpoint = small()
    model = torch.nn.Module()
    model.config = SimpleNamespace(**{**checkpoint.config, "n_layers": 10**9})
    model.register_parameter("wte", torch.nn.Parameter(torch.ones(64, 16)))
    with pytest.raises(ValueError, match=r"the Module in memory lacks .*: 1 tensors are not 1000000000 layers"):
        wrap(model)


def test_a_vocabulary_that_is_no_number_is_not_replaced_by_the_table(small):
    for bad in (True, 0, -5, "64"):
        with pytest.raises(ValueError, match=f"vocab_size={bad!r}"):
            load(small("dream").write(vocab_size=bad))


def test_ids_are_guessed_for_published_vocabularies_alone(small):
    """Another vocabulary of LLaDA's kind has other tokens at these places."""
    unknown = ("mask_token_id", "eos_token_id", "pad_token_id", "embedding_size")
    config = small().config | dict.fromkeys(unknown)
    read = family_of(config).spec
    assert read({**config, "vocab_size": 126464}).mask_token_id == 126336
    own = read({**config, "vocab_size": 155136})
    assert (own.mask_token_id, own.eos_token_id, own.pad_token_id, own.eot_token_id) == (5, 2, 1, None)
    with pytest.raises(ValueError, match="no mask_token_id, and a vocabulary of 151936 has no usual one: add the id"):
        read({**config, "vocab_size": 151936})
    assert read({**config, "vocab_size": 151936, "mask_token_id": 5}).eos_token_id is None


def test_every_number_that_is_taken_can_be_computed_with(small):
    for theta, eps in ((1e-30, 1e-30), (1e38, 1.0)):
        model = load(small().write(rope_theta=theta, rms_norm_eps=eps), device="cpu")
        assert model.rope_tables(8)[0].isfinite().all() and model(torch.tensor([[1, 2]])).isfinite().all()
