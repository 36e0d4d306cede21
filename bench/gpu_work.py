"""The operations as steps of LLaDA-8B and Dream-7B call them: inputs, contenders, bytes and FLOPs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dkv import kernels
from dkv.bench import gpu_baselines as eager
from dkv.kernels.choose import reference
from dkv.models import ModelSpec

SHAPE_OF = {"llada": "llada-8b", "dream": "dream-7b"}
TITLES = {"llada": "LLaDA-8B", "dream": "Dream-7B"}
ACTIVE = 32
SLOTS = (512, 1024, 2048)
BATCHES = (1, 8)
MOST_LOGIT_ROWS = 4096


@dataclass(frozen=True)
class Work:
    """One operation on given inputs.

    Attributes:
        ours: the call, run on one backend after the other.
        others: further ways to compute it, by name; a "flex" one compiles when it is first called.
        bytes, flops: that cannot be avoided: every input read and every output written once.
        inputs: the tensors that all of them read and write, by name.
    """

    ours: Callable[[], object]
    others: dict[str, Callable[[], object]]
    bytes: int
    flops: int
    inputs: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """B rows of S slots, N of them active."""

    spec: ModelSpec
    batch: int
    slots: int
    active: int
    dtype: torch.dtype


def _nbytes(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _positions(z: Sizes, device: torch.device) -> torch.Tensor:
    """int64 [B, N]: active slots, ascending."""
    return torch.rand(z.batch, z.slots, device=device).argsort(1)[:, : z.active].sort(1).values


def _flex(q, k, v, ranges) -> Callable[[], object]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if ranges is not None:
        mask = create_block_mask(
            lambda b, h, i, j: (j >= ranges[b, 0]) & (j < ranges[b, 1]), len(q), None, q.shape[1], k.shape[1],
            device=str(q.device),
        )  # fmt: skip
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def attention(z: Sizes, device: torch.device, ragged: bool = False) -> Work:
    """Attention of the active queries; `ragged` rows end between half of the slots and all of them."""
    size, group = z.spec.head_dim, z.spec.num_heads // z.spec.num_kv_heads
    shapes = [(z.active, z.spec.num_heads), (z.slots, z.spec.num_kv_heads), (z.slots, z.spec.num_kv_heads)]
    q, k, v = (torch.randn(z.batch, n, h, size, device=device, dtype=z.dtype) for n, h in shapes)
    ranges, visible, keys = None, None, z.batch * z.slots
    if ragged:
        stops = [z.slots - z.slots // 2 * i // max(z.batch - 1, 1) for i in range(z.batch)]
        ranges, keys = torch.tensor([[0, stop] for stop in stops], device=device), sum(stops)
        visible = reference.visibility(q, k, None, ranges, None, None, None)

    def sdpa():
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        if visible is None:
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=group > 1)
        # With a mask, grouped heads would take the slow path; transformers repeats them too.
        key, value = (x.repeat_interleave(group, 1) if group > 1 else x for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible.unsqueeze(1))

    built: list[Callable[[], object]] = []

    def flex():
        if not built:
            built.append(_flex(q, k, v, ranges))
        return built[0]()

    others = {"eager": lambda: eager.attention(q, k, v, visible), "sdpa": sdpa, "flex": flex}
    read = keys * z.spec.num_kv_heads * size * 2 * z.dtype.itemsize
    work = kernels.Workspace()
    ours = lambda: kernels.cached_attention(q, k, v, key_ranges=ranges, workspace=work)  # noqa: E731
    flops = 4 * keys * z.active * z.spec.num_heads * size
    return Work(ours, others, read + 2 * _nbytes(q), flops, {"q": q, "k": k, "v": v})


def rope_scatter(z: Sizes, device: torch.device) -> Work:
    size, heads, kv_heads = z.spec.head_dim, z.spec.num_heads, z.spec.num_kv_heads
    q, k, v = (
        torch.randn(z.batch, z.active, h, size, device=device, dtype=z.dtype) for h in (heads, kv_heads, kv_heads)
    )
    table_dtype = torch.float32 if z.spec.rope_float32 else z.dtype
    cos, sin = (torch.rand(z.slots, size // 2, device=device).to(table_dtype) for _ in range(2))
    buffers = torch.zeros(2, z.batch, z.slots, kv_heads, size, device=device, dtype=z.dtype)
    positions = _positions(z, device)
    given = (q, k, v, cos, sin, positions, *buffers)
    tables = 2 * len(positions.unique()) * cos[0].nbytes
    return Work(
        lambda: kernels.rope_scatter_(*given, validate=False), {"eager": lambda: eager.rope_scatter_(*given)},
        2 * _nbytes(q, k, v) + tables + _nbytes(positions), 3 * (q.numel() + k.numel()),
        dict(zip(("q", "k", "v", "cos", "sin", "positions", "k_buf", "v_buf"), given, strict=True)),
    )  # fmt: skip


def gather(z: Sizes, device: torch.device) -> Work:
    x = torch.randn(z.batch, z.slots, z.spec.hidden_size, device=device, dtype=z.dtype)
    index = _positions(z, device)
    moved = 2 * index.numel() * z.spec.hidden_size * z.dtype.itemsize + _nbytes(index)
    others = {"eager": lambda: eager.gather_rows(x, index)}
    return Work(lambda: kernels.gather_rows(x, index, validate=False), others, moved, 0, {"x": x, "index": index})


def scatter(z: Sizes, device: torch.device) -> Work:
    x = torch.randn(z.batch, z.slots, z.spec.hidden_size, device=device, dtype=z.dtype)
    index = _positions(z, device)
    source = torch.randn(z.batch, z.active, z.spec.hidden_size, device=device, dtype=z.dtype)
    others = {"eager": lambda: eager.scatter_rows_(x, index, source)}
    return Work(
        lambda: kernels.scatter_rows_(x, index, source, validate=False), others,
        2 * _nbytes(source) + _nbytes(index), 0, {"x": x, "index": index, "source": source},
    )  # fmt: skip


def _logit_rows(z: Sizes) -> int:
    return min(z.batch * z.active, MOST_LOGIT_ROWS)


def _softmax_dtype(z: Sizes) -> torch.dtype:
    """The published sampler of LLaDA takes float64, that of Dream the dtype of the logits."""
    return torch.float64 if z.spec.family == "llada" else z.dtype


def _chosen_bytes(rows: int) -> int:
    """Of the tokens, int64, and their confidences, float32."""
    return 12 * rows


def choose(z: Sizes, device: torch.device, drawn: bool = False) -> Work:
    """The choice from logits; `drawn` at temperature 1."""
    logits = torch.randn(_logit_rows(z), z.spec.vocab_size, device=device, dtype=z.dtype)
    work, banned = kernels.Workspace(), (z.spec.mask_token_id,)
    how = {"temperature": float(drawn), "banned": banned, "workspace": work, "validate": False}
    others = {} if drawn else {"eager": lambda: eager.choose_token(logits, _softmax_dtype(z))}
    moved = _nbytes(logits) + _chosen_bytes(len(logits))
    return Work(lambda: kernels.choose_token(logits, **how), others, moved, 4 * logits.numel(), {"logits": logits})


def choose_fused(z: Sizes, device: torch.device) -> Work:
    hidden = torch.randn(_logit_rows(z), z.spec.hidden_size, device=device, dtype=z.dtype)
    weight = torch.randn(z.spec.vocab_size, z.spec.hidden_size, device=device, dtype=z.dtype) / 64
    work, banned = kernels.Workspace(), (z.spec.mask_token_id,)
    return Work(
        lambda: kernels.choose_token_fused(hidden, weight, banned=banned, workspace=work, validate=False),
        {"eager": lambda: eager.choose_token(hidden @ weight.T, _softmax_dtype(z))},
        _nbytes(hidden, weight) + _chosen_bytes(len(hidden)), 2 * hidden.numel() * z.spec.vocab_size,
        {"hidden": hidden, "weight": weight},
    )  # fmt: skip


def commit(z: Sizes, device: torch.device) -> Work:
    canvas = torch.zeros(z.batch, z.slots, dtype=torch.int64, device=device)
    token = torch.randint(1, z.spec.vocab_size, (z.batch, z.active), device=device)
    confidence = torch.randn(z.batch, z.active, device=device)
    eligible, count = torch.rand(z.batch, z.active, device=device) < 0.9, torch.ones_like(canvas[:, 0])
    places, row = _positions(z, device), torch.arange(z.batch, device=device)[:, None]

    def published():
        part = canvas[row, places]
        committed = eager.commit_(part, token, confidence, eligible, 1)
        canvas[row, places] = part
        return committed

    # Read: what describes the slots. Written: which of them are committed, and one token in every row.
    moved = _nbytes(token, confidence, eligible, places, count, eligible) + z.batch * token.element_size()
    return Work(
        lambda: kernels.commit_(canvas, token, confidence, eligible, count, positions=places, validate=False),
        {"eager": published}, moved, 0, {"canvas": canvas},
    )  # fmt: skip


def items(specs: dict[str, ModelSpec], tiny: bool) -> Iterator[tuple[str, Callable[[torch.device], Work]]]:
    """Every (name, function that makes the work on a device), the smaller shapes first."""
    slots, batches, some = ((48,), (1, 2), 8) if tiny else (SLOTS, BATCHES, ACTIVE)
    dtype = torch.float32 if tiny else torch.bfloat16
    for s in slots:
        for b in batches:
            for family, spec in specs.items():
                full, cached = Sizes(spec, b, s, s, dtype), Sizes(spec, b, s, some, dtype)
                for kind, z in (("full", full), ("cached", cached)):
                    where = f"{kind} {TITLES[family]} B{b} S{s}"
                    for make in (attention, rope_scatter, gather, scatter, choose, choose_fused, commit):
                        if kind == "full" and make in (gather, scatter):
                            continue
                        yield f"{make.__name__} {where}", lambda device, make=make, z=z: make(z, device)
                    if b > 1:
                        yield f"attention ragged {where}", lambda device, z=z: attention(z, device, ragged=True)
                drawn = f"choose drawn cached {TITLES[family]} B{b} S{s}"
                yield drawn, lambda device, z=cached: choose(z, device, drawn=True)
