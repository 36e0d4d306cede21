"""Random numbers keyed by what they are for."""

import math

import pytest
import torch

from dkv.kernels.common import noise

KEYS = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [5, 130, 7], [2**40, -1, 3]])


def test_a_row_does_not_depend_on_its_neighbours():
    together = noise.uniform(KEYS, 50)
    for row in range(len(KEYS)):
        assert torch.equal(noise.uniform(KEYS[row : row + 1], 50)[0], together[row])
    assert torch.equal(noise.uniform(KEYS.flip(0), 50), together.flip(0))


def test_a_column_does_not_depend_on_how_many_there_are():
    whole = noise.uniform(KEYS, 50)
    assert torch.equal(noise.uniform(KEYS, 20), whole[:, :20])
    assert torch.equal(noise.gumbel(KEYS, 30, 20), noise.gumbel(KEYS, 50)[:, 20:])


def test_every_part_of_the_key_counts():
    """Also the order of its words, and the upper halves of 64-bit numbers."""
    keys = torch.cat([KEYS, KEYS + 2**33, KEYS * torch.tensor([1, 1, 2**32])]).unique(dim=0)
    rows = {tuple(row.tolist()) for row in noise.uniform(keys, 4)}
    assert len(rows) == len(keys)


def test_the_same_numbers_every_day():
    """Results with a seed can be cited, so a change of the numbers is a change of the package."""
    bits = torch.stack(noise.row_hash(torch.tensor([[2, 3]])))
    assert bits.flatten().tolist() == [2496276806, 1289549145]


@pytest.mark.parametrize("axis", ["columns", "rows", "steps"])
def test_uniform_along_every_axis(axis):
    count = 40_000
    if axis == "columns":
        sample = noise.uniform(torch.tensor([[1, 2, 3]]), count)[0]
    else:
        keys = torch.zeros(count, 3, dtype=torch.int64)
        keys[:, 1 if axis == "rows" else 2] = torch.arange(count)
        sample = noise.uniform(keys, 1)[:, 0]
    cells = torch.histc(sample, 64, 0, 1)
    chi2 = ((cells - count / 64).square() / (count / 64)).sum().item()
    assert abs(chi2 - 63) < 5 * math.sqrt(2 * 63)
    pairs = torch.stack([sample[:-1], sample[1:]])
    assert abs(torch.corrcoef(pairs)[0, 1].item()) < 5 / math.sqrt(count)


def test_rows_and_their_columns_are_unrelated():
    """The trap of counters: column c of row r must not be column c + 1 of row r - 1."""
    keys = torch.arange(200)[:, None]
    u = noise.uniform(keys, 200)
    assert u.unique().numel() > 39_900  # of 40,000; collisions of 24-bit mantissas are expected, copies are not
    correlation = torch.corrcoef(u)
    assert (correlation - torch.eye(200)).abs().max() < 6 / math.sqrt(200)


def test_gumbel_has_its_mean_and_variance():
    sample = noise.gumbel(torch.arange(200)[:, None], 200).double()
    assert sample.mean().item() == pytest.approx(0.57722, abs=0.03)
    assert sample.var().item() == pytest.approx(math.pi**2 / 6, abs=0.08)


@pytest.mark.parametrize("bits", [0, 1, 2**24, 2**31, 2**32 - 129, 2**32 - 1])
def test_C06_extreme_bits_give_finite_noise(bits, monkeypatch):
    monkeypatch.setattr(noise, "_mix", lambda x: x * 0 + bits)
    u = noise.uniform(KEYS[:1], 1)
    assert 0 < u.item() < 1
    assert noise.gumbel(KEYS[:1], 1).isfinite().all()


def test_nothing_is_read_back(no_readback):
    with no_readback():
        noise.gumbel(KEYS, 5)
