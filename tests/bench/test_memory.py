"""Traced allocations: exact for known ones, and a copy of the logits does not go unnoticed."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import record_function

from dkv.bench.options import Options
from dkv.bench.shapes import as_loaded, random_model, shape, tiny
from dkv.bench.speed import memory
from dkv.bench.speed.allocations import peak, record
from dkv.kernels.choose import torch as torch_choice
from dkv.models.packing import can_pack, pack_

CPU = torch.device("cpu")
M = 1 << 20
BATCH, PROMPT, NEW = 2, 8, 24


def floats(bytes_: int) -> torch.Tensor:
    return torch.empty(bytes_ // 4)


@pytest.fixture(scope="module")
def plain_model():
    return random_model(tiny(shape("llada-8b")), CPU, torch.float32)


@pytest.fixture(scope="module")
def options(plain_model):
    policies = ("plain", "decode 8", "prefill", "greedy 16")
    return Options("tiny", as_loaded(plain_model), plain_model, PROMPT, NEW, BATCH, policies=policies)


def test_peak_counts_what_is_alive_at_once():
    def one_after_the_other():
        first = floats(M)
        del first
        return floats(2 * M)

    def together():
        first = floats(M)
        return first, floats(2 * M)

    assert peak(one_after_the_other) == 2 * M
    assert peak(together) == 3 * M
    assert peak(lambda: None) == 0


def test_peak_is_beyond_what_lived_before():
    kept = floats(4 * M)
    assert peak(lambda: kept.zero_()) == 0
    assert peak(lambda: kept[: M // 4].clone()) == M


def test_memory_inside_an_operation_counts():
    x = torch.rand(256, 1024)
    # A float64 copy of x, and the result.
    assert peak(lambda: F.softmax(x, -1, dtype=torch.float64)) == 2 * 8 * x.numel()
    query = torch.rand(1, 4, 64, 32)
    result = query.numel() * 4
    assert peak(lambda: F.scaled_dot_product_attention(query, query, query)) > result


def test_spans_of_a_trace():
    def call():
        before = floats(3 * M)
        with record_function("middle"):
            x = floats(2 * M)
            del before
            y = floats(M)
            del x
        return y, floats(5 * M)

    _, trace = record(call)
    (span,) = trace.marks["middle"]
    assert trace.alive(span[0]) == 3 * M
    # 3 MB are given back in between, which the peak takes into account and the bytes of its own do not.
    assert trace.peak(span) == 2 * M and trace.held(span, least=1) == 3 * M
    assert trace.held(span, least=2 * M) == 2 * M and trace.held(span, least=3 * M) == 0
    assert trace.most(span) == {"peak": 2 * M, "largest": 2 * M} and trace.most()["largest"] == 5 * M
    assert trace.peak() == 6 * M


def test_unknown_device_is_refused():
    with pytest.raises(ValueError, match="device must be one of cpu, cuda"):
        record(lambda: None, "meta")


@pytest.fixture(scope="module")
def measured(options):
    return json.loads(json.dumps(memory.measure(options)))


def test_rows_follow_from_the_sizes(options, measured):
    found = measured
    spec, size = options.model.spec, PROMPT + NEW
    ours = [row for row in found["rows"] if row["way"] == "dkv"]
    kinds = ["plain full", *(f"{p} {kind}" for p in options.policies[1:] for kind in ("full", "cached"))]
    assert [f"{row['policy']} {row['kind']}" for row in ours] == kinds
    slots = 128  # 32 and the spare, padded
    buffer = spec.num_layers * 2 * BATCH * slots * spec.num_kv_heads * spec.head_dim * 4
    # Cached steps score two fewer and one fewer a row, Greedy one slot: in all filled up to a multiple of 4.
    every = BATCH * NEW
    scored = {"plain": (every,), "decode 8": (every, every - 4), "prefill": (every, every), "greedy 16": (4, 4)}
    for row in ours:
        rows = scored[row["policy"]][row["kind"] == "cached"]
        assert row["logits_mb"] == rows * spec.vocab_size * 4 / 1e6
        assert row["buffer_mb"] == buffer / 1e6
        assert row["weights_mb"] == sum(p.numel() for p in options.eager.parameters()) * 4 / 1e6
        assert row["logits_mb"] <= row["peak_mb"] and row["largest_mb"] <= row["peak_mb"]
        assert row["scratch_mb"] <= row["peak_mb"]
        # Of a single row of this vocabulary, the bookkeeping of the choice is as large as the logits.
        assert row["policy"] == "greedy 16" or 0.9 < row["copies"] <= 1.6
    # The hidden states of every slot go through the gated MLP together with its two inputs.
    assert ours[0]["peak_mb"] * 1e6 > 3 * BATCH * size * spec.intermediate_size * 4
    assert "No step holds more than one scratch" in memory.table({"rows": ours[:-2], "refused": {}})


def test_baseline_is_compared_where_there_is_one(options, measured):
    found = dict(measured)
    spec, size = options.model.spec, PROMPT + NEW
    eager = {(row["policy"], row["kind"]): row for row in found["rows"] if row["way"] == "eager"}
    kinds = [
        ("plain", "full"),
        *((policy, kind) for policy in ("decode 8", "greedy 16") for kind in ("full", "cached")),
    ]
    assert list(eager) == kinds
    # Float32 logits of all slots and their float64 softmax with its copy.
    logits = BATCH * size * spec.vocab_size * 4
    assert eager["plain", "full"]["peak_mb"] * 1e6 >= logits * 5
    assert eager["plain", "full"]["largest_mb"] * 1e6 == logits * 2
    kept = spec.num_layers * 2 * BATCH * (PROMPT + 1) * spec.num_kv_heads * spec.head_dim * 4
    assert eager["decode 8", "cached"]["buffer_mb"] * 1e6 > kept
    assert list(found["refused"]) == ["prefill"]
    found["rows"] = [row for row in found["rows"] if row["policy"] != "greedy 16"]
    text = memory.table(found)
    assert "No baseline for prefill: cache must be" in text and "(plain, full step: " in text
    alone = memory.measure(replace(options, eager=None, policies=("plain",)))
    assert {row["way"] for row in alone["rows"]} == {"dkv"} and alone["refused"] == {}


def test_equal_ratios_are_both_told():
    def row(policy, way, size):
        own = {"copies": 1.0, "scratch_mb": 1.0, "logits_mb": 1.0} if way == "dkv" else {}
        return {"policy": policy, "way": way, "kind": "full", "buffer_mb": size, "peak_mb": size, **own}

    rows = [row(policy, way, size) for policy in ("a", "b") for way, size in (("dkv", 1.0), ("eager", 2.0))]
    said = memory.verdict(rows)[-1]
    assert "2.0 (a, full step: 4.0 and 2.0 MB)" in said and "b, full step" in said, said


@pytest.mark.parametrize("packed", [True, False])
def test_a_copy_of_the_logits_is_noticed(options, monkeypatch, packed):
    choose = torch_choice._choose_in_strips

    def wasteful(strips, *args, **kwargs):
        kept = []
        return choose((kept.append(strip[0].clone()) or strip for strip in strips), *args, **kwargs)

    model = options.model if packed else options.eager
    own = replace(options, model=model, eager=None, policies=("decode 8",))
    before = memory.measure(own)["rows"]
    monkeypatch.setattr(torch_choice, "_choose_in_strips", wasteful)
    found = memory.measure(own)
    for row, old in zip(found["rows"], before, strict=True):
        assert row["copies"] == pytest.approx(old["copies"] + 1)
    assert "The cached step of decode 8 holds 2.00 copies of its logits at once: MORE THAN" in memory.table(found)


def test_scratch_from_the_workspace_is_told_from_memory_of_a_step(plain_model):
    unpacked = Options("tiny", plain_model, None, PROMPT, NEW, policies=("plain",))
    found = memory.measure(unpacked)
    assert found["rows"][0]["scratch_mb"] >= found["rows"][0]["logits_mb"] and "anew" not in memory.table(found)
    found["rows"][0]["scratch_mb"] = 0.0
    assert "In 1 of 1 steps it is allocated anew" in memory.table(found)


@pytest.mark.skipif(not can_pack(), reason="this build of PyTorch does not pack weights")
def test_packed_weights_count():
    # Rows of a packed weight are padded to a multiple of 64.
    plain = random_model(replace(tiny(shape("llada-8b")), intermediate_size=128), CPU, torch.float32)
    model, trace = record(lambda: pack_(copy.deepcopy(plain)))
    assert sum(p.numel() for p in model.parameters()) < model.num_parameters
    assert memory.weight_bytes(model) == memory.weight_bytes(plain) == trace.alive(float("inf"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_trace_of_a_gpu_agrees_with_its_allocator():
    def call():
        x = torch.empty(M, device="cuda")
        return x.softmax(0).double()

    call()
    _, trace = record(call, "cuda")
    assert trace.peak() == peak(call, "cuda")
