"""What `dkv audit` compiles is what an operation launches: types and constants of every kernel."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dkv import kernels
from dkv.kernels.common.backend import has_triton, interpreted

if not (has_triton() and interpreted()):
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from triton.runtime.interpreter import InterpretedFunction

from dkv.kernels.attention import triton as attention
from dkv.kernels.choose import triton as choose
from dkv.kernels.commit import triton as commit
from dkv.kernels.commit.reference import Chosen, Pass, Rules, State
from dkv.kernels.common.arguments import Strided
from dkv.kernels.common.launch import Call, Chip, Launch, chip_of, trial
from dkv.kernels.dev.cases import TYPES, described, meta
from dkv.kernels.plan.reference import FIELDS
from dkv.kernels.rope_scatter import triton as rope
from tests.kernels.test_linear_triton import CALLS as OF_FEW_BITS

B, N, S, H, D, V = 2, 3, 70, 2, 16, 50
PLACES = torch.arange(N).expand(B, N)
KEYS = torch.arange(N)[:, None]


def heads(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(B, tokens, H, D, dtype=dtype)


def tables() -> tuple[Tensor, Tensor]:
    return torch.ones(S, D // 2), torch.zeros(S, D // 2)


def longs(*size: int, device: str = "cpu") -> Tensor:
    return torch.zeros(size, dtype=torch.int64, device=device)


def flags(*size: int, device: str = "cpu") -> Tensor:
    return torch.zeros(size, dtype=torch.bool, device=device)


def mask(slots: int, device: str = "cpu") -> Tensor:
    """As a generation keeps it: the last column of a wider tensor is left out."""
    return flags(B, slots + 1, device=device)[:, :-1]


def steps(slots: int, entries: int, scored: int, device: str = "cpu") -> dict[str, tuple]:
    """By name a call of each operation on the state of the rows: the operation, its arguments and its options."""
    whole, now, of_rows = longs(B, slots, device=device), longs(B, len(FIELDS), device=device), longs(B, device=device)
    tokens, invalid = longs(B, slots + 1, device=device), flags(B, device=device)
    masked, dense = mask(slots, device), flags(B, slots, device=device)
    state = State(tokens, masked, dense, dense.clone(), whole, of_rows.clone(), now, of_rows.clone(), invalid)
    passed = Pass(dense, dense, dense, of_rows, of_rows)
    choice = Chosen(longs(scored, device=device), *(torch.zeros(scored, device=device) for _ in range(2)))
    table, report = longs(B, 9, len(FIELDS), device=device), longs(5, B, device=device)
    reported = {"cut": of_rows, "invalid": invalid, "chosen": dense, "kind": "window"}
    rules = Rules(longs(3, device=device), 0, "threshold", 0.5)
    return {
        "plan_pass": (kernels.plan_pass, (now, masked, whole, of_rows, dense), reported),
        "pack_pass": (kernels.pack_pass, (tokens, dense, dense, of_rows, report, entries, scored), {}),
        "with_masked_window": (kernels.with_masked_window, (dense, masked, longs(B, 3, device=device), 4), {}),
        "advance_": (kernels.advance_, (state, table, passed, choice, rules), {}),
    }


KERNELS = ["plan_kernel", "pack_kernel", "window_kernel", "advance_kernel"]

# Public calls: the operation, its arguments and options, and the kernels that it launches.
CALLS = {
    "attention": (
        kernels.cached_attention,
        (heads(N), heads(S), heads(S)),
        {"return_lse": True},
        ["attention_kernel"],
    ),
    "attention in parts": (
        kernels.cached_attention,
        (heads(1)[:1, :, :1], heads(600)[:1, :, :1], heads(600)[:1, :, :1]),
        {"key_ranges": torch.tensor([[0, 600]])},
        ["attention_kernel", "merge_kernel"],
    ),
    "masked attention": (
        kernels.cached_attention,
        (heads(N, torch.float16), heads(S, torch.float16), heads(S, torch.float16)),
        {"mask": torch.ones(B, N, S, dtype=torch.bool), "query_lengths": torch.tensor([N, 1])},
        ["attention_kernel", "attention_kernel"],
    ),
    "packed attention": (
        kernels.cached_attention,
        (heads(N)[0], heads(600), heads(600)),
        {"query_starts": torch.tensor([0, 2]), "query_lengths": torch.tensor([2, 1]), "return_lse": True},
        ["attention_kernel"],
    ),
    "attention_mass": (
        kernels.attention_mass,
        (heads(N)[0], heads(S), torch.zeros(N, H), torch.zeros(N)),
        {"query_starts": torch.tensor([0, 2]), "query_lengths": torch.tensor([2, 1]), "most_queries": 2},
        ["mass_kernel", "total_kernel"],
    ),
    "packed rope_scatter_": (
        kernels.rope_scatter_,
        (heads(N)[0], heads(N)[0], heads(N)[0], *tables(), PLACES[0], heads(S), heads(S)),
        {"rows": torch.tensor([0, 1, 1]), "validate": False},
        ["rope_scatter_kernel"],
    ),
    "rope_scatter_": (
        kernels.rope_scatter_,
        (heads(N), heads(N), heads(N), *tables(), PLACES, heads(S), heads(S)),
        {"k_norm": (torch.ones(D), 1e-6), "validate": False},
        ["rope_scatter_kernel"],
    ),
    "choose_token": (
        kernels.choose_token,
        (torch.eye(N, V),),
        {"temperature": 0.7, "row_keys": KEYS, "rule": "margin", "return_entropy": True, "validate": False},
        ["choose_kernel", "merge_kernel"],
    ),
    "choose_token_fused": (
        kernels.choose_token_fused,
        (torch.zeros(N, D), torch.zeros(V, D)),
        {"head_bias": torch.zeros(V), "confidence_temperature": 0.5, "banned": (1,), "validate": False},
        ["choose_kernel", "merge_kernel"],
    ),
    "row_change": (
        kernels.row_change,
        (torch.zeros(3, D), torch.zeros(B, S, D), PLACES[0], torch.tensor([0, 1, 1])),
        {"delta": torch.zeros(3, D), "validate": False},
        ["row_change_kernel"],
    ),
    "keep_rows_": (
        kernels.keep_rows_,
        (torch.zeros(5, D), torch.zeros(B, S, D), PLACES[0], torch.tensor([0, 1, 1])),
        {"entries": torch.tensor([0, 2, 3]), "validate": False},
        ["keep_rows_kernel"],
    ),
    "commit_": (
        kernels.commit_,
        (torch.zeros(B, S, dtype=torch.int64), PLACES, torch.zeros(B, N), PLACES >= 0, torch.ones(B).long()),
        {"positions": PLACES, "validate": False},
        ["commit_kernel"],
    ),
    **OF_FEW_BITS,
    **{name: (*call, [kernel]) for (name, call), kernel in zip(steps(S, N, N).items(), KERNELS, strict=True)},
}


@pytest.mark.parametrize("name", CALLS)
def test_an_audit_case_has_the_types_and_constants_of_the_launch(name, monkeypatch):
    operation, args, options, names = CALLS[name]
    launched, start = [], InterpretedFunction.run

    def run(kernel, *args, **given):
        launched.append((kernel, given))
        return start(kernel, *args, **given)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    with kernels.use_backend("triton"):
        operation(*args, **options)
        assert [kernel.__name__ for kernel, _ in launched] == names
        with trial(chip=chip_of(torch.device("cpu"))) as tried:
            args, options = tree_map_only(Tensor, lambda x: x.to("meta"), (args, options))
            operation(*args, **options)
    assert len(launched) == len(names)  # nothing runs while launches are collected
    for (kernel, given), call in zip(launched, tried.calls, strict=True):
        assert kernel is call.kernel and given["grid"] == call.grid
        assert (given["num_warps"], given["num_stages"]) == (call.launch.warps, call.launch.stages)
        known = described(call)
        found, expected = (leaves({name: x[name] for name in kernel.arg_names}) for x in (given, known.types))
        assert [path for path, _ in found] == [path for path, _ in expected]
        for (path, x), (_, kind) in zip(found, expected, strict=True):
            if isinstance(x, Tensor):
                assert kind == f"*{TYPES[x.dtype]}"
            elif kind == "constexpr":
                assert known.constants[path] == getattr(x, "value", x)
            else:
                assert kind == ("fp32" if isinstance(x, float) else "i32")


def launches(tokens: int, slots: int, packed: bool) -> list[Call]:
    """A layer's operations on an H100: what is launched for so many active slots of each of two rows."""

    def heads(*size: int) -> Tensor:
        return meta(*((2 * size[0],) if packed else (2, size[0])), size[1], 128)

    q, kv, table = heads(tokens, 8), heads(tokens, 2), meta(4096, 64, dtype="fp32")
    k, v = (meta(2, slots + 1, 2, 128) for _ in range(2))
    places, of_rows = meta(*q.shape[:-2], dtype=torch.int64), {"dtype": torch.int64}
    rows = {"rows": meta(2 * tokens, **of_rows)} if packed else {}
    rules = {"query_starts": meta(2, **of_rows), "most_queries": tokens} if packed else {}
    with trial(chip=Chip("sm_90", 132)) as tried, kernels.use_backend("triton"):
        kernels.rope_scatter_(q, kv, kv, table, table, places, k, v, validate=False, **rows)
        lengths, ranges = meta(2, **of_rows), meta(2, 2, **of_rows)
        k, v = k[:, :slots], v[:, :slots]
        kernels.cached_attention(q, k, v, query_lengths=lengths, key_ranges=ranges, **rules)
        if packed:
            lse, weight = meta(*q.shape[:2], dtype="fp32"), meta(len(q), dtype="fp32")
            kernels.attention_mass(q, k, lse, weight, query_lengths=lengths, key_ranges=ranges, **rules)
        kernels.rms_norm(q, meta(128), residual=q)
        kernels.swiglu(q)
    return tried.calls


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [(1, 3, 4), (16, 9, 15), (448, 449, 500)], ids=["few", "some", "many"])
def test_another_length_needs_no_other_kernel(tokens, packed):
    """One compilation for all, though the slots are divided in 8 parts and in 16."""
    first, *others = (launches(n, slots, packed) for n, slots in zip(tokens, (512, 1024, 2047), strict=True))
    assert [call.kernel.__name__ for call in first][:2] == ["rope_scatter_kernel", "attention_kernel"]
    for calls in others:
        for call, expected in zip(calls, first, strict=True):
            assert call.kernel is expected.kernel and call.launch == expected.launch
            assert described(call) == described(expected)


def state_launches(slots: int, entries: int, scored: int) -> list[Call]:
    """Of a step beside its layers: what a GPU gets whose entries are not filled up."""
    with trial(chip=Chip("sm_90", 132)) as tried, kernels.use_backend("triton"):
        for operation, args, options in steps(slots, entries, scored, "meta").values():
            found = operation(*args, **options)
            if operation is kernels.pack_pass:
                _, positions, rows, *_ = found
        table, hidden = meta(4096, 64, dtype="fp32"), meta(entries, 256)
        k, v = (meta(B, slots + 1, 2, 128) for _ in range(2))
        q = meta(entries, 2, 128)
        kernels.rope_scatter_(q, q, q, table, table, positions, k, v, rows=rows, validate=False)
        kernels.rms_norm(hidden, meta(256), residual=hidden)
        kernels.choose_token_fused(meta(scored, 256), meta(50000, 256), banned=(7,), validate=False)
    return tried.calls


@pytest.mark.parametrize("scored", [(5, 7, 8), (33, 40, 48)], ids=["few", "more"])
def test_the_state_of_another_length_needs_no_other_kernel(scored):
    sizes = zip((512, 515, 1024), (64, 97, 96), scored, strict=True)
    first, *others = (state_launches(*size) for size in sizes)
    names = [call.kernel.__name__ for call in first]
    assert names[:6] == [*KERNELS, "rope_scatter_kernel", "rms_norm_kernel"] and "choose_kernel" in names
    for calls in others:
        for call, expected in zip(calls, first, strict=True):
            assert call.kernel is expected.kernel and call.launch == expected.launch
            assert described(call) == described(expected), call.kernel.__name__


def leaves(x, path: tuple = ()) -> list[tuple[tuple, object]]:
    """The arguments of a kernel, also those in tuples, with their names and places."""
    if isinstance(x, dict):
        return [leaf for name, part in x.items() for leaf in leaves(part, (name,))]
    if isinstance(x, tuple) and path != ("BANNED",):
        return [leaf for place, part in enumerate(x) for leaf in leaves(part, (*path, place))]
    return [(path, x)]


@pytest.mark.parametrize(
    ("module", "name", "replacement", "kernel", "argument", "value"),
    [
        (attention, "_wide", lambda *_: True, "attention_kernel", lambda x: x["C"].WIDE.value, True),
        (attention, "precision", lambda x: "tf32", "attention_kernel", lambda x: x["C"].PRECISION.value, "tf32"),
        (attention, "MERGE", {"default": Launch((32,), 8)}, "merge_kernel", lambda x: x["ENTRIES"], 32),
        (choose, "precision", lambda x: "tf32", "choose_kernel", lambda x: x["C"].PRECISION.value, "tf32"),
        (choose, "MERGE", Launch((4096,), 8), "merge_kernel", lambda x: x["BLOCK_R"], 128),
        (commit, "strided", lambda x: Strided(x, (7, 7)), "commit_kernel", lambda x: x["canvas"].stride, (7, 7)),
        (
            rope,
            "computable",
            lambda x: x.half(),
            "rope_scatter_kernel",
            lambda x: x["k_buf"][0].ptr.dtype,
            torch.float16,
        ),
    ],
)
def test_the_audit_follows_a_launcher(monkeypatch, module, name, replacement, kernel, argument, value):
    def seen() -> set:
        calls = (case.call for case in module.audit_cases("sm_90"))
        return {argument(call.arguments) for call in calls if call.kernel.__name__ == kernel}

    before = seen()
    monkeypatch.setattr(module, name, replacement)
    assert seen() != before and value in seen()
