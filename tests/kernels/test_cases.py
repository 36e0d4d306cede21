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
from dkv.kernels.common.launch import Launch, chip_of, recording
from dkv.kernels.dev.cases import TYPES, Case, case
from dkv.kernels.rope_scatter import triton as rope_scatter

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
        ["logits_kernel", "merge_kernel"],
    ),
    "choose_token_fused": (
        kernels.choose_token_fused,
        (torch.zeros(N, D), torch.zeros(V, D)),
        {"head_bias": torch.zeros(V), "confidence_temperature": 0.5, "banned": (1,), "validate": False},
        ["hidden_kernel", "merge_kernel"],
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
        with recording(chip_of(torch.device("cpu"))) as made:
            args, options = tree_map_only(Tensor, lambda x: x.to("meta"), (args, options))
            operation(*args, **options)
    assert len(launched) == len(names)  # nothing runs while launches are recorded
    for (kernel, given), call in zip(launched, made.calls, strict=True):
        compiled = case(name, call)
        assert kernel is compiled.kernel and given["grid"] == call.grid
        assert (given["num_warps"], given["num_stages"]) == (compiled.launch.warps, compiled.launch.stages)
        assert {x: given[x] for x in compiled.constants} == compiled.constants
        types = {x: f"*{TYPES[given[x].dtype]}" for x in kernel.arg_names if isinstance(given[x], Tensor)}
        assert types == {x: kind for x, kind in compiled.arguments.items() if kind.startswith("*")}
        assert {*compiled.constants, *compiled.arguments} == {*kernel.arg_names}


def cases(module, kernel: str, arch: str) -> list[Case]:
    return [x for x in module.audit_cases(arch) if x.kernel.__name__ == kernel]


@pytest.mark.parametrize(
    ("module", "name", "replacement", "kernel", "argument", "value"),
    [
        (attention, "_wide", lambda *_: True, "attention_kernel", "WIDE", True),
        (attention, "precision", lambda x: "tf32", "attention_kernel", "PRECISION", "tf32"),
        (attention, "MERGE", Launch((32,), 8), "merge_kernel", "ROWS", 32),
        (choose, "precision", lambda x: "tf32", "hidden_kernel", "PRECISION", "tf32"),
        (choose, "MERGE", Launch((4096,), 8), "merge_kernel", "BLOCK_R", 128),
        (commit, "strides", lambda **_: {}, "commit_kernel", "stride_cs", "missing"),
        (rope_scatter, "computable", lambda x: x.half(), "rope_scatter_kernel", "k_buf", "*fp16"),
    ],
)
def test_the_audit_follows_a_launcher(monkeypatch, module, name, replacement, kernel, argument, value):
    def seen() -> set:
        return {(x.arguments | x.constants).get(argument, "missing") for x in cases(module, kernel, "sm_90")}

    before = seen()
    monkeypatch.setattr(module, name, replacement)
    assert seen() != before and value in seen()
