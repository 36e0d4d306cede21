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
from dkv.kernels.common.arguments import Strided
from dkv.kernels.common.launch import Launch, chip_of, trial
from dkv.kernels.dev.cases import TYPES, described
from dkv.kernels.rope_scatter import triton as rope

B, N, S, H, D, V = 2, 3, 70, 2, 16, 50
PLACES = torch.arange(N).expand(B, N)
KEYS = torch.arange(N)[:, None]


def heads(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(B, tokens, H, D, dtype=dtype)


def tables() -> tuple[Tensor, Tensor]:
    return torch.ones(S, D // 2), torch.zeros(S, D // 2)


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
    "rope_scatter_": (
        kernels.rope_scatter_,
        (heads(N), heads(N), heads(N), *tables(), PLACES, heads(S), heads(S)),
        {"k_norm": (torch.ones(D), 1e-6), "validate": False},
        ["rope_scatter_kernel"],
    ),
    "choose_token": (
        kernels.choose_token,
        (torch.eye(N, V),),
        {"temperature": 0.7, "row_keys": KEYS, "rule": "margin", "validate": False},
        ["choose_kernel", "merge_kernel"],
    ),
    "choose_token_fused": (
        kernels.choose_token_fused,
        (torch.zeros(N, D), torch.zeros(V, D)),
        {"head_bias": torch.zeros(V), "confidence_temperature": 0.5, "banned": (1,), "validate": False},
        ["choose_kernel", "merge_kernel"],
    ),
    "commit_": (
        kernels.commit_,
        (torch.zeros(B, S, dtype=torch.int64), PLACES, torch.zeros(B, N), PLACES >= 0, torch.ones(B).long()),
        {"positions": PLACES, "validate": False},
        ["commit_kernel"],
    ),
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
        (attention, "MERGE", Launch((32,), 8), "merge_kernel", lambda x: x["ENTRIES"], 32),
        (choose, "precision", lambda x: "tf32", "choose_kernel", lambda x: x["C"].PRECISION.value, "tf32"),
        (choose, "MERGE", Launch((4096,), 8), "merge_kernel", lambda x: x["BLOCK_R"], 128),
        (commit, "strided", lambda x: Strided(x, (7, 7)), "commit_kernel", lambda x: x["canvas"].stride, (7, 7)),
        (rope, "computable", lambda x: x.half(), "rope_scatter_kernel", lambda x: x["k_buf"].ptr.dtype, torch.float16),
    ],
)
def test_the_audit_follows_a_launcher(monkeypatch, module, name, replacement, kernel, argument, value):
    def seen() -> set:
        calls = (case.call for case in module.audit_cases("sm_90"))
        return {argument(call.arguments) for call in calls if call.kernel.__name__ == kernel}

    before = seen()
    monkeypatch.setattr(module, name, replacement)
    assert seen() != before and value in seen()
