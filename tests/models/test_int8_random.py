"""Products of bytes of random shapes and sizes against float64, and what no company may change."""

import pytest
import torch
from torch import Tensor, nn

import dkv
from dkv.kernels.choose import torch as torch_choice
from dkv.models.int8 import ZERO, Int8Gates, Int8Linear, Rounded, quantised, rounded, why_not_int8
from dkv.models.mixture import Bank, Shared
from dkv.models.packing import PackedBank, PackedHead, PackedShared

pytestmark = pytest.mark.skipif(why_not_int8() is not None, reason="this CPU does not multiply bytes")

# Roundings to float32 on the way from an exact sum of bytes to an output, at their widest.
EPS = 4 * torch.finfo(torch.float32).eps


class Case:
    """A layer and its input, of random shapes: rows of zeros, a large channel, sizes of many orders."""

    def __init__(self, seed: int, most: int = 700):
        self.draw = torch.Generator().manual_seed(seed)
        # As many small shapes as large ones.
        self.rows, inputs, outputs = (int(size ** self.uniform(0, 1)) for size in (201, most + 1, most + 1))
        self.rows -= self.uniform(0, 1) < 0.3
        self.x = self.normal(self.rows, inputs) * 10.0 ** self.uniform(-20, 20)
        self.x *= 10 ** self.normal(self.rows, 1)
        self.x[:, self.integer(inputs)] *= 10 ** self.uniform(0, 4)
        self.x[torch.rand(self.rows, generator=self.draw) < 0.1] = 0
        self.linear = self.layer(inputs, outputs, bias=seed % 2 == 0)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.draw).item()

    def integer(self, stop: int) -> int:
        return int(torch.randint(stop, (), generator=self.draw))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw)

    def layer(self, inputs: int, outputs: int, bias: bool) -> nn.Linear:
        linear = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
        linear.weight.copy_(self.normal(outputs, inputs) * 10 ** self.normal(outputs, 1))
        linear.weight[torch.rand(outputs, generator=self.draw) < 0.1] = 0
        if bias:
            # As large as what it is added to.
            linear.bias.copy_(self.normal(outputs) * (self.x.abs().max() if self.x.numel() else 1))
        return linear

    def few(self) -> Tensor:
        """Some of the rows, in another order."""
        return torch.randperm(self.rows, generator=self.draw)[: self.integer(self.rows) + 1 if self.rows else 0]


def exactly(x: Tensor, linear: nn.Linear) -> Tensor:
    """The product of the rounded numbers in float64, without the bias."""
    numbers, scale = rounded(x)
    weight, scales = quantised(linear.weight)
    return ((numbers.double() - ZERO) @ weight.double().T) * scale.double() * scales.double()


def assert_within(found: Tensor, exact: Tensor, bound: Tensor) -> None:
    assert found.shape == exact.shape and found.isfinite().all()
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("seed", range(40))
def test_a_product_is_that_of_its_rounded_numbers_and_as_near_as_promised(seed):
    case = Case(seed)
    linear, x, packed = case.linear, case.x, Int8Linear(case.linear)
    product, bias = exactly(x, linear), 0 if linear.bias is None else linear.bias.double()
    exact, size = product + bias, product.abs() + abs(bias)
    found = packed(x)
    assert_within(found, exact, EPS * size)
    other = case.normal(*exact.shape) * (size.max().float() if size.numel() else 1)
    assert_within(packed(x, add=other), exact + other, EPS * (size + other.abs()))
    # As the docstring has it.
    wide, weight = x.double(), linear.weight.double()
    step, steps = wide.abs().amax(-1, keepdim=True) / 254, weight.abs().amax(1) / 254
    bound = step * weight.abs().sum(1) + wide.abs().sum(-1, keepdim=True) * steps + x.shape[1] * step * steps
    assert_within(found, wide @ weight.T + bias, bound * (1 + EPS) + EPS * size)
    # In any company, to the bit.
    few = case.few()
    assert torch.equal(packed(x[few]), found[few])
    assert torch.equal(packed(x[few], add=other[few]), packed(x, add=other)[few])
    assert torch.equal(dkv.unpack(packed).weight, quantised(linear.weight)[0].float() * packed.scales[:, None])


@pytest.mark.parametrize("seed", range(12))
def test_a_gated_product_is_rounded_as_near_as_a_number_is(seed):
    case = Case(seed, 300)
    # Of sizes that SiLU bends.
    x = case.x / case.x.abs().amax(-1, keepdim=True).clamp(min=1e-25) * case.uniform(0.01, 10)
    gate, up = case.linear, case.layer(x.shape[1], case.linear.out_features, seed % 2 == 0)
    for linear in (gate, up):
        linear.weight.div_(linear.weight.abs().amax().clamp(min=1e-3))
        if linear.bias is not None:
            linear.bias.copy_(case.normal(len(linear.bias)))
    parts = [exactly(x, linear) + (0 if linear.bias is None else linear.bias.double()) for linear in (gate, up)]
    exact = nn.functional.silu(parts[0]) * parts[1]
    gates = Int8Gates(gate, up)
    found = gates(x)
    size = exact.abs().amax(-1, keepdim=True)
    assert isinstance(found, Rounded) and found.numbers.dtype == torch.uint8
    assert_within((found.numbers.double() - ZERO) * found.scale, exact, size * (0.5 / 127 + 1e-4) + 1e-12)
    few = case.few()
    for whole, alone in zip(found, gates(x[few]), strict=True):
        assert torch.equal(whole[few], alone)
    for linear, plain in zip((gate, up), dkv.unpack(gates), strict=True):
        assert torch.equal(plain.weight, dkv.unpack(Int8Linear(linear)).weight)


@pytest.mark.parametrize("seed", range(6))
def test_experts_give_each_of_their_entries_what_one_of_them_gives_it(seed):
    case = Case(seed, 200)
    bank = Bank.of([case.layer(case.x.shape[1], case.linear.out_features, False).weight for _ in range(5)])
    cuts = torch.randint(case.rows + 1, (4,), generator=case.draw).sort().values.tolist()
    counts = [stop - start for start, stop in zip([0, *cuts], [*cuts, case.rows], strict=True)]
    packed = PackedBank(bank, Int8Linear)
    if not case.rows:
        return
    alone = [part(few) for part, few in zip(packed.parts, case.x.split(counts), strict=True)]
    assert torch.equal(packed.each(case.x, counts), torch.cat(alone))
    for weight, plain in zip(bank.weight, dkv.unpack(packed).weight, strict=True):
        numbers, scales = quantised(weight)
        assert torch.equal(plain, numbers.float() * scales[:, None])


@pytest.mark.parametrize(("outputs", "bias"), [(8193, True), (20_011, False)])
def test_a_head_in_strips_is_one_product(outputs, bias):
    case = Case(8)
    linear = case.layer(37, outputs, bias)
    x = case.normal(50, 37)
    packed, whole = PackedHead(linear, Int8Linear), Int8Linear(linear)
    assert torch.equal(packed(x), whole(x)) and torch.equal(packed(x[3:4]), whole(x)[3:4])
    assert next(packed.strips(x)).shape[1] == torch_choice.STRIP
    assert torch.equal(dkv.unpack(packed).weight, dkv.unpack(whole).weight)


BROKEN = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("bias", [True, False])
def test_an_activation_that_is_no_number_never_becomes_one(value, bias):
    case = Case(3)
    linears = [case.layer(33, 70, bias) for _ in range(2)]
    x, other = case.normal(9, 33), case.normal(9, 70)
    broken = x.clone()
    broken[[1, 6], [4, 20]] = value
    good = [0, 2, 3, 4, 5, 7, 8]
    plain, other_plain = (Int8Linear(linear) for linear in linears)
    shared = PackedShared(
        Shared.of({"gate_proj": linears[0], "up_proj": linears[1], "down_proj": case.layer(70, 33, bias)}), Int8Linear
    )
    calls = [plain, shared, lambda x: plain(x, add=other)]
    calls += [lambda x: Int8Linear.each([plain, other_plain], x, [4, 5])] * (not bias)
    for call in calls:
        found, want = call(broken), call(x)
        assert not found[[1, 6]].isfinite().any() and torch.equal(found[good], want[good])
    head = PackedHead(case.layer(33, 9000, bias), Int8Linear)
    assert not head(broken)[[1, 6]].isfinite().any() and torch.equal(head(broken)[good], head(x)[good])


@pytest.mark.parametrize("value", BROKEN)
def test_a_weight_that_is_no_number_breaks_its_output_alone(value):
    case = Case(5)
    linear, x = case.layer(40, 12, False), case.normal(6, 40)
    want = Int8Linear(linear)(x)
    linear.weight[7, 3] = value
    found, good = Int8Linear(linear)(x), [n for n in range(12) if n != 7]
    assert not found[:, 7].isfinite().any() and torch.equal(found[:, good], want[:, good])
