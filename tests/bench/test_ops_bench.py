"""The micro-benchmarks: their figures by hand, and that a wrong way is noticed before it is timed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_map_only

from dkv import kernels
from dkv.bench import machine
from dkv.bench.baselines import operations as baselines
from dkv.bench.gpu import operations
from dkv.bench.gpu.cases import Sizes
from dkv.bench.gpu.operations import OPERATIONS
from dkv.bench.gpu.ops import COLUMNS
from dkv.bench.gpu.ways import both_sides
from dkv.bench.ops import runner
from dkv.bench.shapes import shape, tiny
from dkv.kernels.common.backend import interpreted
from tests.bench.conftest import NAMES, fast

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FULL, CACHED = 24, 8


def build(operation: str, family: str = "llada-8b", active: int = CACHED, dtype: torch.dtype = torch.float32, **how):
    torch.manual_seed(0)
    with torch.no_grad():
        return OPERATIONS[operation](Sizes(tiny(shape(family)), 2, FULL, active, dtype), CPU, **how)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the figures are those of a CPU")
def test_a_run_states_bytes_flops_and_shares(tmp_path):
    path = tmp_path / "result.json"
    environment = {k: v for k, v in os.environ.items() if k != "DKV_BACKEND" and not k.startswith("PYTEST")}
    chosen = "dream and cached and b1 and (attention or commit) and not (flex or gap or mass)"
    options = ["-p", "no:cacheprovider", "-rs", "--benchmark-only", "-k", chosen, f"--benchmark-json={path}"]
    options += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=3"]
    command = [sys.executable, "-m", "pytest", "bench/", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    out, content = done.stdout, json.loads(path.read_text())
    assert done.returncode == 0, out + done.stderr
    rows = {(b["params"]["name"].split()[0], b["params"]["way"]): b for b in content["benchmarks"]}
    ways = {"attention": ("eager", "sdpa", "torch"), "commit": ("eager", "torch")}
    assert list(rows) == [(operation, way) for operation, every in ways.items() for way in every]
    assert "2] bench/ops/runner.py" in out and "triton needs a GPU" in out
    assert content["machine_info"]["dkv"]["torch"] == torch.__version__
    # A quarter of Dream's heads over 256 slots, 32 of them active, float32: K, V, queries and output; two products.
    attention = rows["attention", "torch"]["extra_info"]
    assert attention["sizes"] == {"B": 1, "N": 32, "S": 256, "Hq": 7, "Hkv": 1, "D": 128}
    assert attention["bytes"] == 4 * (2 * 256 * 128 + 2 * 32 * 7 * 128)
    assert attention["flops"] == 2 * 2 * 7 * 32 * 256 * 128
    # Token, confidence, whether eligible, position of 32 slots, and a count; which were committed, and one token.
    commit = rows["commit", "torch"]["extra_info"]
    assert commit["bytes"] == 32 * (8 + 4 + 1 + 8) + 8 + 32 + 8 and commit["flops"] == 0
    for (operation, way), row in rows.items():
        info, median = row["extra_info"], row["stats"]["median"]
        assert info["copy_share"] == pytest.approx(info["bytes"] / info["copy_bytes_per_s"] / median)
        assert info["matrix_share"] == pytest.approx(info["flops"] / info["matrix_flops_per_s"] / median)
        name = f"{operation} cached Dream-7B B1 S256"
        assert row["group"] == name and row["params"]["way"] == way
        line = next(line for line in out.splitlines() if line.startswith(f"{name}  "))
        assert f"{median * 1e3:.3f} \u00b1" in line
    assert "the data fit in the cache," in out


def by_hand(operation: str) -> tuple[int, int]:
    """Bytes and FLOPs of `build(operation)`: 2 rows of 24 slots, 8 active, 4 heads of 16, d 64, V 256, float32."""
    b, n, heads, d, v = 2, 8, 4 * 16, 64, 256
    r = b * n
    return {
        "cached_attention": (4 * b * (2 * 24 + 2 * n) * heads, 4 * b * n * 24 * heads),
        # A row of 8 queries over 24 slots, and one of 4 over 12: keys, queries, their log-sum-exp and weight; the sums.
        "attention_mass": (4 * (36 * heads + 12 * (heads + 4 + 1) + b * 24), 2 * (8 * 24 + 4 * 12) * heads),
        "choose_token": (r * v * 4 + r * 12, 4 * r * v),
        "choose_token_fused": ((r + v) * d * 4 + r * 12, 2 * r * d * v),
        "commit_": (r * (8 + 4 + 1 + 8 + 1) + b * 16, 0),
        # Half of the entries go on: read with what is added to them, kept, and given; three numbers each.
        "keep_rows_": (4 * 4 * r // 2 * d + 3 * 8 * r // 2, 0),
        "row_change": (4 * (3 * r * d + r) + 2 * 8 * r, 0),
        "rms_norm": (4 * (4 * r * d + d), 0),
        "swiglu": (4 * 3 * r * 96, 0),
        # Gate and up of d inputs, which are groups of 64 in 4 bits.
        "int8_linear": (4 * r * (d + 192) + 192 * (d + 4), 2 * r * d * 192),
        "int4_linear": (4 * r * (d + 192) + 192 * (d // 2 + 4), 2 * r * d * 192),
        # Two masks and the ranks, the steps, and of a row its length, slots that were cut, six counts and its flag.
        "plan_pass": (b * 24 * (2 + 8 + 2) + b * 8 * (7 + 2 + 6) + b, 0),
        "pack_pass": (b * 24 * 2 + 8 * (r * (1 + 6) + b * 5), 0),
        "with_masked_window": (b * 24 * 3 + b * 4 * 8, 0),
        # Tokens with a spare slot and ranks; five masks read and three written; a step read, looked up and written; its
        # number, twice, slots that were cut, count and start; token, confidence and score; a flag a row, and an end.
        "advance_": (b * (25 * 8 + 24 * (8 + 5 + 3)) + b * 8 * (3 * 7 + 5) + r * (8 + 4 + 4) + b + 8, 0),
    }[operation]


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "rope_scatter_"])
def test_bytes_and_flops(operation):
    case = build(operation)
    assert (case.bytes, case.flops) == by_hand(operation)


def test_bytes_and_flops_of_rope_scatter():
    # In a full step every row of cos and sin is read: 24 of 8 float32 each.
    case = build("rope_scatter_", active=FULL)
    assert case.bytes == 2 * 3 * 2 * FULL * 64 * 4 + 2 * FULL * 8 * 4 + 2 * FULL * 8
    assert case.flops == 3 * 2 * 2 * FULL * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("active", [FULL, CACHED], ids=["full", "cached"])
@pytest.mark.parametrize("family", ["llada-8b", "dream-7b"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_all_ways_agree(operation, family, active, dtype):
    case = build(operation, family, active, dtype)
    for way in ("eager", "torch", *({"sdpa"} & case.others.keys())):
        case.check(way)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("down", [False, True])
def test_pytorchs_own_product_of_8_bits_agrees(down, dtype):
    build("int8_linear", dtype=dtype, down=down).check("int8pack")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llada-8b", "dream-7b"])
@pytest.mark.parametrize("operation", ["choose_token", "choose_token_fused"])
def test_all_ways_agree_in_the_entropy(operation, family, dtype):
    case = build(operation, family, FULL, dtype, entropy=True)
    assert len(case.expected) == 3
    for way in ("eager", "torch"):
        case.check(way)
    # A number of float32 for each of two rows of 24.
    assert case.bytes == build(operation, family, FULL, dtype).bytes + 2 * 24 * 4


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("entropy", [False, True])
def test_both_sides_of_the_border_agree(entropy):
    case = build("choose_token_fused", entropy=entropy)
    sides = both_sides(torch.device("cuda"), kernels.Choice(entropy=entropy), kernels.Workspace())
    assert list(sides) == ["fused", "strips"]
    for way in sides:
        replace(case, others=sides).check(way)


def wrong(operation: str):
    """A torch operation that is off in one place of its first result."""
    right = getattr(fast(operation), NAMES.get(operation, operation))

    def run(*args, **kwargs):
        found = right(*args, **kwargs)
        # What gives nothing has written into its first argument.
        first = args[0] if found is None else found
        first = (first[0] if isinstance(first, tuple) else first).view(-1)
        first[-1] = ~first[-1] if first.dtype == torch.bool else (first[-1] + 1) % 200
        return found

    return run


@pytest.fixture
def run(monkeypatch) -> runner.Runner:
    """On a machine of round numbers."""
    monkeypatch.setattr(runner, "rates", lambda device, dtype: {"copy_bytes_per_s": 1e9, "matrix_flops_per_s": 1e9})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return runner.Runner()


def make(operation: str):
    """A case of tiny sizes on a device, as `dkv.bench.ops` names it."""
    z = Sizes(tiny(shape("llada-8b")), 2, FULL, CACHED, torch.float32)
    return operation, lambda device: OPERATIONS[operation](z, device)


class Benchmark:
    """In place of the fixture: notes the calls, or has a median."""

    def __init__(self, median: float | None = None):
        self.calls, self.extra_info = 0, {}
        self.stats = median and SimpleNamespace(stats=SimpleNamespace(median=median, data=[median] * 3))

    def __call__(self, call):
        self.calls += 1


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_wrong_way_is_noticed_and_not_timed(monkeypatch, run, operation):
    benchmark = Benchmark()
    run.measure(benchmark, *make(operation), "torch")
    monkeypatch.setattr(fast(operation), NAMES.get(operation, operation), wrong(operation))
    with pytest.raises(AssertionError, match=r"torch: result . is off"):
        run.measure(benchmark, *make(operation), "torch")
    assert benchmark.calls == 1


def test_table(run):
    for way, median in (("eager", 4e-5), ("torch", 1e-5), ("sdpa", None)):
        run.measure(Benchmark(median), *make("cached_attention"), way)
    _, said, heads, line, *_ = run.table()
    assert "copy 0.001 TB/s, float32 matrix product 0.001 TFLOP/s" in said
    assert heads.split() == " ".join(COLUMNS).split()
    # 40 and 10 us; at 1 GB/s and 1 GFLOP/s the least times are bytes and FLOPs in nanoseconds.
    nbytes, flops = by_hand("cached_attention")
    cells = [f"{nbytes / 1e6:.4g}", f"{flops / 1e9:.4g}", f"{nbytes / 1e4:.0%}", f"{flops / 1e4:.0%}", "4.00x", "eager"]
    assert line.split()[-6:] == cells and "0.040 \u00b1" in line and "0.010 \u00b1" in line


def test_what_cannot_run_is_skipped_with_the_reason(monkeypatch, run):
    with pytest.raises(pytest.skip.Exception, match="triton needs a GPU"):
        run.measure(Benchmark(), *make("commit_"), "triton")

    def broken(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(operations, "compiled_flex", broken)
    with pytest.raises(pytest.skip.Exception, match="flex attention does not run here: RuntimeError: no compiler"):
        run.measure(Benchmark(), *make("cached_attention"), "flex")
    monkeypatch.setattr(runner, "COMPILE_SECONDS", {"cpu": -1})
    with pytest.raises(pytest.skip.Exception, match="choose fewer shapes"):
        run.measure(Benchmark(), *make("cached_attention"), "flex")
    assert run.found == {}


@pytest.mark.parametrize("operation", ["rope_scatter_", "commit_", "advance_"])
def test_a_way_that_writes_nothing_is_noticed(monkeypatch, operation):
    case = build(operation)
    case.check("torch")
    right = getattr(fast(operation), operation)

    def idle(*given):
        return right(*tree_map_only(torch.Tensor, torch.clone, given))

    monkeypatch.setattr(fast(operation), operation, idle)
    with pytest.raises(AssertionError, match="is off"):
        case.check("torch")


def test_a_wrong_eager_way_is_noticed(monkeypatch):
    case = build("rope_scatter_")
    monkeypatch.setattr(baselines, "rotate", lambda x, cos, sin: x)
    with pytest.raises(AssertionError, match="eager: result 0 is off"):
        case.check("eager")


def test_cases_of_both_models():
    found = runner.cases("cpu")
    rows, cached = (
        ("attention ragged", "attention packed", "rope_scatter packed"),
        ("choose drawn", "choose_fused entropy"),
    )
    state = ("plan", "pack", "window", "advance")
    others = ("attention", "attention gap", "rope_scatter", "choose", "choose_fused", "commit")
    for name in (*rows, *state, *cached, *others):
        assert f"{name} cached Dream-7B B8 S256" in found
    assert not {
        name
        for name in found
        if (name.startswith(rows) and " B1 " in name) or (name.startswith(cached) and "full" in name)
    }
    assert "commit full LLaDA-8B B1 S1024" in runner.cases("cuda")
    llada, dream = (runner.scaled(shape(name)) for name in ("llada-8b", "dream-7b"))
    assert (llada.num_heads, llada.num_kv_heads, llada.head_dim, llada.hidden_size) == (4, 4, 128, 512)
    assert (dream.num_heads, dream.num_kv_heads, dream.head_dim, dream.hidden_size) == (7, 1, 128, 896)
    assert (llada.vocab_size, dream.vocab_size) == (126464 // 8, 152064 // 8)
    sizes = found["commit cached Dream-7B B8 S256"](CPU).sizes
    assert sizes == {"B": 8, "N": 32, "S": 256}


def test_rates_count_what_is_read_and_written(monkeypatch):
    monkeypatch.setattr(machine, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(machine, "SIDE", {"cpu": 64})
    calls, slow = [], set()

    def median(call, device):
        result = call()
        calls.append(result)
        return 0.5 if result.dtype in slow else 0.01

    monkeypatch.setattr(machine, "median_seconds", median)
    expected = {"copy_bytes_per_s": 2 * (1 << 20) / 0.01, "matrix_flops_per_s": 2 * 64**3 / 0.01}
    assert machine.rates(CPU, torch.float32) == expected
    assert calls[0].nbytes == 1 << 20 and [x.shape[0] for x in calls[1:]] == [16, 64]
    assert machine.rates(CPU, torch.bfloat16) == expected and calls[-1].dtype == torch.bfloat16
    # Where a product takes long, the small one has to do.
    slow.add(torch.bfloat16)
    assert machine.matrix_rate(CPU, torch.bfloat16) == 2 * 16**3 / 0.5 and calls[-1].shape[0] == 16
    with pytest.raises(ValueError, match=r"dtype must be a float dtype, got torch\.int8"):
        machine.rates(CPU, torch.int8)
