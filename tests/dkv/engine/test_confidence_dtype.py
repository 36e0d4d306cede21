"""The setting confidence_dtype, from the names users give it by to the slots that are filled."""

import json

import pytest
import torch

import dkv
from dkv.cli import main
from dkv.kernels import BACKENDS, use_backend

VOCABULARY, NEW = 64, 12
DREAM = {"confidence": "margin", "temperature": 0.1, "confidence_dtype": "model"}


@pytest.fixture
def script():
    """Logits of bfloat16 numbers, sharp enough for many confidences to be equal when they are rounded."""
    torch.manual_seed(4)
    sharp = torch.linspace(1, 3, NEW)[torch.randperm(NEW), None]
    return (sharp * torch.randn(NEW, VOCABULARY)).bfloat16()


def order(output: dkv.DiffusionOutput) -> list[int]:
    """The new slots in the order in which they were filled, those of one step from left to right."""
    known = output.history[:, 0, 1:] != VOCABULARY - 1
    return sorted(range(NEW), key=lambda slot: (int(known[:, slot].int().argmax()), slot))


def expected(logits: torch.Tensor) -> list[int]:
    """The surest first, of equals the leftmost: margins by the description of Dream's sampler."""
    first, second = (logits / 0.1).softmax(-1).topk(2).values.unbind(-1)
    confidence = first - second
    assert confidence.dtype == torch.bfloat16 and confidence.unique().numel() < NEW
    return confidence.double().sort(descending=True, stable=True).indices.tolist()


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize(
    "cache", [None, dkv.DecodeCache(3), dkv.PrefillDecodeCache(3)], ids=lambda cache: str(cache)[:13]
)
def test_slots_are_filled_in_the_published_order(cache, backend, script, stub):
    if backend == "triton" and cache != dkv.DecodeCache(3):
        pytest.skip("one policy is enough for the interpreter")
    model = stub(lambda _, positions: script[positions.clamp(max=NEW - 1)], VOCABULARY, shifted=True)
    # One slot a step; a model whose logits are shifted has those of slot j at slot j - 1.
    settings = {"schedule": "blocks", "max_new_tokens": NEW, "cache": cache, "output_history": True, "seed": 1}
    with use_backend(backend):
        rounded = dkv.generate(model, torch.tensor([[1]]), **settings, **DREAM)
        exact = dkv.generate(model, torch.tensor([[1]]), **settings, **DREAM | {"confidence_dtype": "exact"})
    assert order(rounded) == expected(script)
    assert order(exact) != order(rounded)
    assert rounded.stats.settings["confidence_dtype"] == "model"


def test_a_processor_changes_logits_that_are_rounded_afterwards(script, stub):
    model = stub(lambda _, positions: script[positions.clamp(max=NEW - 1)], VOCABULARY, shifted=True)
    settings = {"schedule": "blocks", "max_new_tokens": NEW, "output_history": True, "seed": 1, **DREAM}

    def nothing(ids, scores):
        assert scores.dtype == torch.float32
        return scores

    found = dkv.generate(model, torch.tensor([[1]]), logits_processor=nothing, **settings)
    assert order(found) == expected(script)


@pytest.mark.parametrize("confidence", ["probability", "margin", "entropy", "random"])
@pytest.mark.parametrize("cache", ["none", "decode", "greedy", "prefix"])
def test_every_rule_and_policy(confidence, cache, build):
    if confidence == "random" and cache == "prefix":
        confidence = "probability"
    model = build(family="dream", num_kv_heads=2, shifted=True, qkv_bias=True).bfloat16()
    settings = {"confidence": confidence, "cache": cache, "temperature": 0.2, "top_p": 0.9, "seed": 3}
    call = {"max_new_tokens": 8, "confidence_dtype": "model", **settings}
    alone = dkv.generate(model, torch.tensor([[5, 9, 3]]), **call)
    assert (alone.sequences != model.spec.mask_token_id).all()
    together = dkv.generate(model, torch.tensor([[5, 9, 3], [7, 2, 8]]), **call)
    assert torch.equal(together.sequences[:1], alone.sequences)


def test_a_threshold_is_compared_with_the_rounded_number(stub):
    """0.9991 is 1 in bfloat16."""
    logits = torch.tensor([0.0, 7.7]).bfloat16().expand(1, 4, 2)
    wide = torch.nn.functional.pad(logits, (0, 6), value=-torch.inf)

    def passes(kind: str) -> int:
        model = stub(lambda _, positions: wide[:, positions[0].clamp(max=3)], 8)
        call = {"max_new_tokens": 4, "threshold": 1.0, "confidence_dtype": kind}
        return dkv.generate(model, torch.tensor([[1]]), **call).stats.passes

    assert (passes("model"), passes("exact")) == (1, 4)


def test_names_and_values():
    assert dkv.DiffusionConfig().confidence_dtype == "exact"
    config = dkv.DiffusionConfig(confidence_dtype="model")
    assert config.to_diff_dict()["confidence_dtype"] == config.settings()["confidence_dtype"] == "model"
    assert dkv.DiffusionConfig(confidence_dtype=None).confidence_dtype == "exact"
    for bad in ("bfloat16", torch.bfloat16):
        with pytest.raises(ValueError, match="confidence_dtype must be one of exact, model, got"):
            dkv.DiffusionConfig(confidence_dtype=bad)


def test_in_the_shell(capsys):
    words = [
        "generate",
        "--model",
        "tiny-dream",
        "--dtype",
        "bfloat16",
        "--max-new-tokens",
        "8",
        "--json",
        "--seed",
        "1",
    ]
    assert main([*words, "--temperature", "0.1", "--confidence", "entropy", "--confidence-dtype", "model", "1+1="]) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["settings"]["confidence_dtype"] == "model"
    assert main([*words, "--confidence-dtype", "half", "1+1="]) != 0
    assert "confidence_dtype must be one of exact, model, got 'half'" in capsys.readouterr().err


def test_in_runs_of_dkv_eval_and_of_lm_eval():
    from dkv.bench.contenders import contenders

    (_, run) = contenders(["confidence=entropy temperature=0.1 confidence_dtype=model"])
    assert run.settings["confidence_dtype"] == "model" and "confidence_dtype=model" in run.label
    pytest.importorskip("lm_eval")
    from dkv.integrations.lm_eval.settings import stated

    assert stated({"alg": "entropy", "confidence_dtype": "model"})["confidence_dtype"] == "model"


@pytest.mark.parametrize("name", ["tiny", "tiny-dream"])
@pytest.mark.parametrize("heat", ["1e-300", "1e-38", "1e6"])
def test_extreme_temperatures_generate(name, heat, capsys):
    words = [
        "generate",
        "--model",
        name,
        "--max-new-tokens",
        "6",
        "--seed",
        "1",
        "--temperature",
        heat,
        "--json",
        "1+1=",
    ]
    assert main(words) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    # Dream's confidences are all 1 at such a temperature, and the leftmost slot comes first.
    if float(heat) < 1 and name == "tiny":
        assert main([*words[:-3], "0", "--json", "1+1="]) == 0
        assert json.loads(capsys.readouterr().out)["tokens"] == tokens


@pytest.mark.parametrize("heat", [1e-320, 1e-38, 1e6])
@pytest.mark.parametrize("confidence", ["probability", "entropy"])
def test_extreme_selection_temperatures(heat, confidence, build):
    model = build()
    call = {"max_new_tokens": 6, "seed": 2, "confidence": confidence, "output_history": True}
    found = dkv.generate(model, torch.tensor([[5, 9, 3]]), selection_temperature=heat, **call)
    plain = dkv.generate(model, torch.tensor([[5, 9, 3]]), **call)
    assert (found.sequences != model.spec.mask_token_id).all()
    assert torch.equal(found.history, plain.history) == (heat < 1)


@pytest.mark.parametrize("name", ["temperature", "selection_temperature", "cfg_scale", "factor"])
def test_infinity_is_no_number_for_a_setting(name):
    with pytest.raises(ValueError, match=f"{name} must be between 0 and 1000000, got inf"):
        dkv.DiffusionConfig(**{name: float("inf")})
