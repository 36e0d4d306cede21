"""The measurement of weights of fewer bits, in a small size, and runs of `dkv eval` with such weights."""

import pytest
import torch

import dkv
from dkv.bench.accuracy import quality
from dkv.bench.contenders import contenders
from dkv.bench.options import of_shape
from dkv.bench.problems import bundled
from dkv.bench.speed import weights
from dkv.bench.speed.floor import PARTS
from dkv.models.int8 import why_not_int8
from dkv.models.packed import why_not_packed

needs_int8 = pytest.mark.skipif(why_not_int8() is not None, reason="this CPU does not multiply bytes")


def test_every_kind_that_there_is_takes_its_turn(monkeypatch):
    options = of_shape("d128x4", 1, device="cpu", prompt=4, new=6, rounds=2)
    found = weights.measure(options)
    kinds = ["float32", weights.ROUNDED, *(name for name in ("bfloat16", "int8") if name not in found["missing"])]
    assert [(row["policy"], row["weights"]) for row in found["rows"]] == [
        (policy, kind) for policy in weights.POLICIES for kind in kinds
    ]
    full = found["rows"][0]
    assert full["over"] == 1 and full["same_tokens"] == 1 and len(full["seconds"]) == 2
    if "int8" in kinds:
        # The table of embeddings stays as it is, and a scale is added for each output.
        packed = full["weight_mb"] - options.model.embed.weight.nbytes / 2**20
        saved = full["weight_mb"] - found["rows"][kinds.index("int8")]["weight_mb"]
        assert 0.7 < saved / packed < 0.75
    assert [step["weights"] for step in found["steps"]] == [kind for kind in kinds if kind != weights.ROUNDED]
    assert all(step[part] > 0 for step in found["steps"] for part in PARTS)
    assert weights.table(found).count("\n") == len(found["rows"]) + len(found["missing"]) + len(PARTS) + 2
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    found = weights.measure(options)
    assert "no int8: this CPU has no VNNI instructions" in weights.table(found)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="--weights is of float32 models on a CPU"):
        weights.measure(of_shape("d128x4", 1, device="cpu", dtype="bfloat16", prompt=4, new=4))


@needs_int8
def test_a_run_may_name_weights_and_is_compared_with_the_model_as_it_is():
    chosen = contenders(["weights=int8 cache=decode refresh=4,8", "weights=int8"])
    assert [c.label for c in chosen] == ["plain", "decode 4 int8", "decode 8 int8", "plain int8"]
    model, tokenizer = dkv.load("tiny", device="cpu"), dkv.load_tokenizer("tiny")
    setting = quality.Setting(
        model,
        tokenizer,
        bundled(["addition"], 4),
        4,
        0,
        others={"int8": dkv.load("tiny", device="cpu", weights="int8")},
    )
    rows = quality.measure(setting, chosen[::3], quality.Log(None, {}))
    assert [row["settings"]["weights"] for row in rows] == [None, "int8"] and rows[1]["problems"] == 4
    with pytest.raises(ValueError, match=r"weights must be one of int8, int4, .*, bfloat16, got 'int3'"):
        contenders(["weights=int3"])


@pytest.mark.skipif(why_not_packed(torch.bfloat16) is not None, reason="this CPU has no bfloat16")
def test_a_model_in_bfloat16_is_packed_where_that_pays():
    model = dkv.load("tiny", device="cpu", dtype="bfloat16")
    assert type(model.layers[0]).__name__ == "PackedLayer" and model.dtype == torch.bfloat16
    plain = dkv.load("tiny", device="cpu", dtype="bfloat16", pack=False)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(ids), plain(ids), atol=0.3, rtol=0.05)
    assert dkv.unpack(model).layers[0].q_proj.weight.equal(plain.layers[0].q_proj.weight)
