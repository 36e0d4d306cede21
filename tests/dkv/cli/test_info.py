"""`dkv info` as text and as JSON."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dkv.kernels.common import backend
from dkv.models import load


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("DKV_BACKEND", raising=False)


@pytest.fixture
def card(monkeypatch):
    """A machine with one GPU."""
    card = SimpleNamespace(name="H100", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)


def line(out: str, start: str) -> str:
    """The one line that starts with a word."""
    (found,) = (text for text in out.splitlines() if text.split()[:1] == [start])
    return found


def test_info(run):
    code, out, err = run("info")
    assert (code, err) == (0, "")
    for word in ("dkv 0", "torch 2", "cpu ", "chosen by the device", "tiny ", "decode ", "refresh=8"):
        assert word in out
    assert line(out, "cpu").endswith(", backend: torch")
    facts = json.loads(run("info", "--json")[1])
    assert facts["devices"]["cpu"]["torch_threads"] == torch.get_num_threads()
    assert facts["backends"]["chosen"] is None and facts["backends"]["used"]["cpu"] == "torch"
    assert set(facts["backends"]["known"]) == {"triton", "torch", "reference"}
    assert facts["backends"]["triton_installed"] == backend.has_triton()
    assert facts["policies"]["greedy"]["window"] == 4 and facts["versions"]["torch"] == torch.__version__


@pytest.mark.skipif(not backend.has_triton(), reason="needs triton")
def test_the_device_decides_which_backend_runs(run, card):
    out = run("info")[1]
    assert "cuda:0     H100, 80.0 GiB, CUDA" in out and line(out, "cuda:0").endswith(", backend: triton")
    assert line(out, "cpu").endswith(", backend: torch")
    assert "fused Triton kernels" in line(out, "triton")


def test_without_triton(run, card, monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    out = run("info")[1]
    assert line(out, "cuda:0").endswith(", backend: torch")
    assert line(out, "triton") == "  triton     not installed: pip install triton"


def test_a_chosen_backend(run, card, monkeypatch):
    monkeypatch.setenv("DKV_BACKEND", "reference")
    out = run("info")[1]
    assert line(out, "cuda:0").endswith("backend: reference") and line(out, "cpu").endswith("backend: reference")
    assert "chosen by DKV_BACKEND: reference" in out
    monkeypatch.setenv("DKV_BACKEND", "abacus")
    assert run("info")[0] == 2


@pytest.mark.skipif(not backend.has_triton(), reason="needs triton")
@pytest.mark.parametrize("interpreted", [False, True])
def test_triton_chosen_on_the_cpu(run, monkeypatch, interpreted):
    monkeypatch.setenv("DKV_BACKEND", "triton")
    monkeypatch.setattr(backend, "interpreted", lambda: interpreted)
    wanted = "triton" if interpreted else "none (Triton runs there with TRITON_INTERPRET=1 alone)"
    assert line(run("info")[1], "cpu").endswith(f", backend: {wanted}")


FAMILIES = Path(__file__).parents[2] / "golden" / "families"


def test_a_model(run):
    code, out, err = run("info", "tiny-dream")
    assert (code, err) == (0, "")
    assert line(out, "family") == "family     dream" and line(out, "outputs").endswith("of the next slot")
    assert line(out, "attention").endswith("every slot sees all")
    assert "793,472 parameters: 3.03 MiB in float32, 1.51 MiB in bfloat16" in line(out, "weights")
    # 4 layers of 2 heads of 32, keys and values, 512 slots.
    assert "K/V 512    1.00 MiB in float32, 0.50 MiB in bfloat16" in out
    assert line(out, "decode").endswith("applies")


def test_a_model_in_blocks(run):
    code, out, _ = run("info", str(FAMILIES / "sdar" / "sdar_tiny"))
    assert code == 0 and "blocks of 4 slots, counted from slot 0" in line(out, "attention")
    out = run("info", str(FAMILIES / "a2d" / "a2d_qwen2"), "--attention-block", "8")[1]
    assert "blocks of 8 slots, counted from the end of the prompt" in line(out, "attention")
    assert line(out, "none").endswith("applies") and "applies" not in line(out, "sliding")


def test_a_mixture(run):
    code, out, _ = run("info", str(FAMILIES / "llada2" / "llada2_tiny"))
    assert code == 0 and "2 of 8, of width 24, and a shared one of 24; an MLP in 1 of the layers" in out


def test_a_model_for_programs(run):
    facts = json.loads(run("info", "--json", str(FAMILIES / "nemotron" / "nemotron_tiny"))[1])
    assert facts["spec"]["family"] == "nemotron" and facts["spec"]["rope"]["factor"] == 16.0
    rounded = {name: facts["weight_bytes"].pop(name) for name in ("int8", "int4", "int8_cpu")}
    assert facts["weight_bytes"] == {"float32": 4 * facts["parameters"], "bfloat16": 2 * facts["parameters"]}
    # Embeddings and norms stay in bfloat16, and on a CPU in float32.
    assert facts["parameters"] < rounded["int8"] < rounded["int8_cpu"] < facts["weight_bytes"]["float32"]
    assert rounded["int4"] < rounded["int8"] < facts["weight_bytes"]["bfloat16"]
    assert facts["kv_bytes"]["bfloat16"] == {"256": 256 * 2 * 2 * 3 * 2 * 24}
    assert facts["kv_bytes"]["int8"] == {"256": 256 * 2 * 3 * 2 * (24 + 2)}
    left = (8 << 30) - facts["weight_bytes"]["bfloat16"]
    assert facts["slots_that_fit"]["bfloat16"]["int8"]["8"] == left // (2 * 3 * 2 * 26)
    assert facts["slots_that_fit"]["int4"]["int8"]["8"] == ((8 << 30) - rounded["int4"]) // (2 * 3 * 2 * 26)
    loaded = load(FAMILIES / "nemotron" / "nemotron_tiny", device="cpu")
    assert facts["parameters"] == loaded.num_parameters


@pytest.fixture
def large(tmp_path):
    """A model shaped like LLaDA-8B, of which there is no weight."""
    config = {"model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32}
    config |= {"mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": 126464, "mask_token_id": 126336}
    config |= {"max_sequence_length": 4096, "rope_theta": 5e5, "weight_tying": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_what_fits_where(run, large):
    code, out, err = run("info", str(large))
    assert (code, err) == (0, "")
    said = out.splitlines()
    assert "K/V 4096   4.00 GiB in float32, 2.00 GiB in bfloat16, 1.02 GiB in int8" in said
    assert "29.86 GiB in float32, 14.93 GiB in bfloat16, 7.95 GiB in int8, 4.90 GiB in int4" in line(out, "weights")
    table = [
        text.split()
        for text in said[said.index("slots of K/V that fit beside the weights, by what they are in") + 2 :][:6]
    ]
    # 24 GiB are 9.07 more than the weights, and a slot has 512 KiB, or 260.
    assert table[0] == ["bfloat16", "bfloat16", "0", "2,190", "18,574", "67,726", "133,262"]
    assert table[1] == ["bfloat16", "int8", "0", "4,314", "36,578", "133,370", "262,425"]
    assert [row[:2] for row in table[2:]] == [
        [bits, kept] for bits in ("int8", "int4") for kept in ("bfloat16", "int8")
    ]
    assert table[5][4] == "77,024"
    (start,) = (i for i, text in enumerate(said) if text.startswith("a cached step of batch 1 with 32 slots"))
    assert said[start + 4].split() == ["int8", "bfloat16", "7.49", "GiB", "(0.518x)", "8.99", "GiB", "(0.563x)"]


def test_what_a_cached_step_reads(run, large):
    facts = json.loads(run("info", "--json", str(large))[1])
    layers, head = 32 * (4 * 4096**2 + 3 * 4096 * 12288), 126464 * 4096
    # Two norms a layer and the last one, 32 embeddings, and 512 KiB a slot.
    others = (2 * 32 + 1) * 4096 * 2 + 32 * 4096 * 2
    scales = 32 * (5 * 4096 + 2 * 12288) * 4 + 126464 * 4
    groups = layers // 128 * 4
    wanted = {
        "bfloat16": 2 * (layers + head) + others,
        "int8": layers + head + scales + others,
        "int4": layers // 2 + groups + head + 126464 * 4 + others,
    }
    for slots in (1024, 4096):
        found = facts["step_bytes"][str(slots)]
        for bits, size in wanted.items():
            assert found[bits]["bfloat16"] == [size + slots * 524288] * 2
            assert found[bits]["int8"] == [size + slots * 266240] * 2
    whole = facts["step_bytes"]["1024"]["bfloat16"]["bfloat16"][0]
    assert facts["step_bytes"]["1024"]["int8"]["bfloat16"][0] / whole < 0.55
    # Over 4,096 slots keys and values are as much as an eighth of the weights, and have to be in 8 bits, too.
    long = facts["step_bytes"]["4096"]
    assert (
        long["int8"]["int8"][0] / long["bfloat16"]["bfloat16"][0]
        < 0.55
        < long["int8"]["bfloat16"][0] / (long["bfloat16"]["bfloat16"][0])
    )


def test_a_step_of_a_mixture_reads_some_experts_or_all(run):
    folder = str(FAMILIES / "llada2" / "llada2_tiny")
    assert "reads (where all choose the same experts, to where each chooses others)" in run("info", folder)[1]
    facts = json.loads(run("info", "--json", folder)[1])
    least, most = facts["step_bytes"]["512"]["bfloat16"]["bfloat16"]
    # Two layers of 8 experts, of which one slot chooses 2, and 32 may choose all.
    assert most - least == 2 * 6 * 3 * 64 * 24 * 2
    assert "int4" not in facts["step_bytes"]["512"]


def test_a_model_without_weights_that_needs_its_family(run, tmp_path):
    """As from the hub, of which only the small files are fetched."""
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config |= {"vocab_size": 64, "intermediate_size": 48, "max_position_embeddings": 64, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "family='stable_diffcoder'" in run("info", str(tmp_path))[2]
    code, _, err = run("info", str(tmp_path), "--family", "stable_diffcoder")
    assert code == 2 and "mask_token_id" in err
    code, out, _ = run("info", str(tmp_path), "--family", "stable_diffcoder", "--mask-token-id", "63")
    assert code == 0 and line(out, "tokens").endswith("mask 63")


def test_what_is_said_of_no_model(run):
    code, _, err = run("info", "--attention-block", "4")
    assert code == 2 and "--attention-block goes with a MODEL" in err
