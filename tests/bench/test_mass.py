"""`bench/speed/mass.py`: what is timed is the attention of the pass, and what its slots get."""

import pytest
import torch

from dkv.bench.contenders import of_lineup
from dkv.bench.options import Options
from dkv.bench.shapes import random_model, shape, tiny
from dkv.bench.speed import mass
from dkv.bench.speed.floor import STEPS
from dkv.bench.steps import HalfWay
from dkv.kernels.common.operation import Operation
from dkv.kernels.mass.op import MASS


@pytest.fixture(params=["llada-8b", "dream-7b"])
def options(request) -> Options:
    model = random_model(tiny(shape(request.param)), torch.device("cpu"), torch.float32)
    return Options("tiny", model, None, prompt=6, new=8, batch=2)


@pytest.mark.parametrize(("kind", "active"), [("full", 14), ("cached", 5)])
def test_every_layer_is_summed_for_every_active_slot(kind, active, options, monkeypatch):
    half_way = HalfWay(options, of_lineup(STEPS[kind]).settings)
    calls, sums, call = mass.contenders(half_way), [], Operation.__call__

    def noted(self, *args, **hints):
        found = call(self, *args, **hints)
        if self is MASS:
            sums.append(found)
        return found

    monkeypatch.setattr(Operation, "__call__", noted)
    assert all(seconds() > 0 for seconds in calls.values())
    assert len(sums) == options.model.spec.num_layers
    for found in sums:
        torch.testing.assert_close(found.sum(1), torch.full((2,), float(active)))


def test_shares_are_of_the_step(options, monkeypatch):
    times = {"step": 0.1, "attention": 0.02, "observed": 0.023, "mass": 0.007}
    monkeypatch.setattr(mass, "contenders", lambda _: {name: lambda s=s: s for name, s in times.items()})
    found = mass.measure(options)
    assert [row["kind"] for row in found["rows"]] == ["full", "cached"]
    for row in found["rows"]:
        assert row["share"] == pytest.approx(0.1) and row["step_ms"] == pytest.approx(100)
    text = mass.table(found)
    assert "10.0%" in text and "cached" in text
