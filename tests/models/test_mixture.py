"""Mixtures of experts: the router and the sum by their definition, and the ways to compute them."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from dkv.models import Transformer, unpack
from dkv.models import mixture as module
from dkv.models.joining import join_
from dkv.models.mixture import Experts, Mixture, Router
from dkv.models.packing import PackedBank, can_pack, pack_
from tests.models.test_transformer import small_spec

KINDS = {
    "softmax": {},
    "renormalised": {"renormalise": True, "chosen": 3},
    "bias in the weights": {"bias": "weights"},
    "bias in the choice": {"bias": "choice", "renormalise": True, "scaling": 0.5},
    "sigmoid in groups": {"score": "sigmoid", "groups": 4, "top_groups": 2, "bias": "choice", "renormalise": True}
    | {"scaling": 2.5, "shared_width": 12},
    "one expert": {"score": "sigmoid", "chosen": 1, "scaling": 2.5},
    "all experts": {"chosen": 8},
    "a single one": {"experts": 1, "chosen": 1, "renormalise": True},
}


def experts_of(size: int = 24, **changes) -> Experts:
    torch.manual_seed(0)
    experts = Experts(Mixture(**{"experts": 8, "chosen": 2, "width": 20, **changes}), size).requires_grad_(False)
    if experts.router.expert_bias is not None:
        nn.init.normal_(experts.router.expert_bias, std=0.3)
    return experts


def defined(experts: Experts, x: Tensor) -> tuple[list[dict[int, float]], Tensor]:
    """Weight of each chosen expert by token, and the sums, in float64, number by number."""
    mixture, found, sums = experts.mixture, [], []
    weight = experts.router.weight.double()
    bias = experts.router.expert_bias
    for token in x.double():
        logits = [float(row @ token) for row in weight]
        if mixture.score == "sigmoid":
            scores = [float(1 / (1 + torch.tensor(-one, dtype=torch.float64).exp())) for one in logits]
        else:
            scores = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
        ranks = scores if bias is None else [score + float(b) for score, b in zip(scores, bias, strict=True)]
        scores = ranks if mixture.bias == "weights" else scores
        size = mixture.experts // mixture.groups
        open_to = list(range(mixture.experts))
        if mixture.groups > 1:
            best = {g: sum(sorted(ranks[g * size : (g + 1) * size])[-2:]) for g in range(mixture.groups)}
            groups = sorted(best, key=lambda g: -best[g])[: mixture.top_groups]
            open_to = [e for e in open_to if e // size in groups]
        chosen = sorted(open_to, key=lambda e: -ranks[e])[: mixture.chosen]
        total = sum(scores[e] for e in chosen) if mixture.renormalise else 1
        found.append({e: scores[e] / total * mixture.scaling for e in chosen})
        parts = [mlp(token, experts.gate_up.weight[e], experts.down.weight[e]) * w for e, w in found[-1].items()]
        if experts.shared is not None:
            up = torch.cat([experts.shared.gate_proj.weight, experts.shared.up_proj.weight])
            parts.append(mlp(token, up, experts.shared.down_proj.weight))
        sums.append(sum(parts))
    return found, torch.stack(sums) if sums else x.double()


def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up.double() @ x).chunk(2)
    return down.double() @ (gate * gate.sigmoid() * up)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 37])
def test_router_and_sum_by_their_definition(changes, tokens):
    experts, x = experts_of(**changes), torch.randn(tokens, 24)
    expected, sums = defined(experts, x)
    weights, chosen = experts.router(x)
    for i, by_expert in enumerate(expected):
        assert set(chosen[i].tolist()) == set(by_expert)
        wanted = torch.tensor([by_expert[e] for e in chosen[i].tolist()])
        torch.testing.assert_close(weights[i], wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(experts(x), sums.float(), atol=1e-5, rtol=1e-5)
    assert experts(x.view(1, tokens, 24)).shape == (1, tokens, 24)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_forms_of_a_gpu_give_the_same(changes, monkeypatch):
    """Grouped products, in a loop here, and every expert on all tokens, strip by strip."""
    experts, x = experts_of(**changes), torch.randn(9, 24)
    weights, chosen = experts.router(x)
    expected = experts._sorted(x, weights, chosen)
    for strip in (1, 9 * 40 * 3, 1 << 26):
        monkeypatch.setattr(module, "STRIP", strip)
        torch.testing.assert_close(experts._everywhere(x, weights, chosen), expected, atol=1e-5, rtol=1e-5)
    order = chosen.flatten().argsort(stable=True)
    entries = x.index_select(0, order // chosen.shape[1])
    counts = chosen.flatten().bincount(minlength=experts.mixture.experts)
    grouped = experts.gate_up.grouped(entries, counts.cumsum(0).int())
    torch.testing.assert_close(grouped, experts.gate_up.each(entries, counts.tolist()), atol=1e-5, rtol=1e-5)


def test_an_expert_that_overflows_elsewhere_changes_nothing():
    experts, x = experts_of(), torch.randn(3, 24)
    weights, chosen = torch.ones(3, 2), torch.tensor([[0, 1], [1, 2], [2, 0]])
    expected = experts._everywhere(x, weights, chosen)
    experts.down.weight[5] = torch.inf
    assert torch.equal(experts._everywhere(x, weights, chosen), expected)


def test_company_changes_a_token_by_rounding_alone():
    experts, x = experts_of(score="sigmoid", groups=4, top_groups=2, shared_width=12), torch.randn(40, 24)
    together = experts(x)
    for i in (0, 17, 39):
        torch.testing.assert_close(experts(x[i : i + 1])[0], together[i], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_leaves_the_bias_wide(dtype):
    experts, x = experts_of(bias="choice", score="sigmoid", renormalise=True), torch.randn(5, 24)
    bias, expected = experts.router.expert_bias.clone(), experts(x)
    experts.to(dtype)
    assert experts.gate_up.weight.dtype == dtype
    assert torch.equal(experts.router.expert_bias.float(), bias)
    assert experts.router.expert_bias.dtype == torch.promote_types(dtype, torch.float32)
    out = experts(x.to(dtype))
    assert out.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(out.float(), expected, atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_chosen_and_the_router():
    experts, x = experts_of(shared_width=12, chosen=1).requires_grad_(True), torch.randn(2, 24, requires_grad=True)
    chosen = set(experts.router(x)[1].flatten().tolist())
    experts(x).square().sum().backward()
    reached = {e for e in range(8) if experts.gate_up.weight.grad[e].any()}
    assert reached == chosen and x.grad.any() and experts.router.weight.grad.any()
    assert all(p.grad is not None for p in experts.shared.parameters())


MIXTURE = Mixture(8, 2, 20, score="sigmoid", bias="choice", renormalise=True, shared_width=12, dense_layers=(0,))


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(small_spec(mixture=MIXTURE)).eval().requires_grad_(False)


def test_models_pack_join_and_turn_back(model):
    ids = torch.arange(12)[None]
    expected, state, count = model(ids), copy.deepcopy(model.state_dict()), model.num_parameters
    kinds = [pack_] if can_pack() else []
    for change in (*kinds, join_):
        changed = change(copy.deepcopy(model))
        torch.testing.assert_close(changed(ids), expected, atol=1e-4, rtol=1e-4)
        assert changed.num_parameters == count
        for other in (changed, pickle.loads(pickle.dumps(changed)), copy.deepcopy(changed)):
            torch.testing.assert_close(other(ids), changed(ids))
            held = other.state_dict()
            assert held.keys() == state.keys() and all(torch.equal(held[name], state[name]) for name in state)
        assert (change is pack_) == any(isinstance(part, PackedBank) for part in changed.modules())
        plain = unpack(changed)
        assert not any(isinstance(part, PackedBank) for part in plain.modules())
        assert torch.equal(plain(ids), expected)


@pytest.mark.skipif(not can_pack(), reason="this build of PyTorch has no oneDNN for this CPU")
def test_packed_experts_are_frozen(model):
    model.layers[1].experts.down.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"only frozen float32 or bfloat16 weights.*layers.1.experts.down is .*trainable"
    ):
        pack_(model)
    packed = pack_(model.requires_grad_(False))
    with pytest.raises(RuntimeError, match="cannot be moved or converted"):
        packed.to(torch.bfloat16)


BAD = [
    ({"experts": 0}, "experts of a mixture must be at least 1, got 0"),
    ({"width": 0}, "width of a mixture must be at least 1"),
    ({"chosen": 9}, r"chosen \(9\) must be at most the 8 experts of 1 of 1 groups"),
    ({"groups": 3}, "8 experts are not 3 groups of one size"),
    ({"groups": 8, "top_groups": 4}, "8 experts are not 8 groups of one size, and of at least two"),
    ({"groups": 2, "top_groups": 3}, r"top_groups \(3\) must be at most groups \(2\)"),
    ({"groups": 4, "chosen": 3}, r"chosen \(3\) must be at most the 2 experts of 1 of 4 groups"),
    ({"score": "tanh"}, "score of a mixture must be 'softmax' or 'sigmoid', got 'tanh'"),
    ({"bias": True}, "bias of a mixture must be 'choice', 'weights' or None, got True"),
    ({"scaling": 0.0}, "scaling of a mixture must be a finite number above 0, got 0.0"),
    ({"shared_width": -1}, "shared_width must be at least 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(c) for c, _ in BAD])
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**{"experts": 8, "chosen": 2, "width": 20, **changes})


def test_dense_layers_are_layers():
    with pytest.raises(ValueError, match=r"dense_layers of the mixture must be in 0..1, got \(2,\)"):
        small_spec(mixture=Mixture(8, 2, 20, dense_layers=(2,)))


def test_routers_of_a_group_with_the_largest_two():
    """A group with one large score loses to one with two that are large together."""
    router = Router(Mixture(4, 1, 8, score="sigmoid", groups=2, top_groups=1, bias="choice"), 4)
    router.expert_bias = nn.Parameter(torch.tensor([1.0, 0.0, 0.7, 0.6]))
    assert router(torch.zeros(1, 4))[1].tolist() == [[2]]
