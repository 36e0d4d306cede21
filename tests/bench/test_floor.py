"""`bench/floor.py`: the products are those of the step, the parts are its parts, and a step can be taken again."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dkv
from dkv.bench.contenders import of_lineup
from dkv.bench.options import Options
from dkv.bench.shapes import as_loaded, of_family, random_model, shape, tiny
from dkv.bench.speed import floor
from dkv.bench.speed.floor import GOALS, PARTS, STEPS, measure, products, recorded, table
from dkv.bench.steps import HalfWay
from dkv.models.joining import join_


@pytest.fixture(params=["llada-8b", "dream-7b"])
def plain(request):
    return random_model(tiny(shape(request.param)), torch.device("cpu"), torch.float32)


def options(model, **settings) -> Options:
    return Options("tiny", model, None, **{"prompt": 6, "new": 8, "batch": 2, **settings})


@pytest.mark.parametrize("kind", GOALS)
def test_a_step_can_be_taken_again(plain, kind):
    half_way = HalfWay(options(plain), of_lineup(STEPS[kind]).settings)
    before = half_way.engine.rows.tokens.clone()
    first = half_way.take()
    assert half_way.engine.rows.masked.sum(1).tolist() == [3, 3]  # of 8 new ones, 4 and then 1 have been decoded
    half_way.back()
    assert torch.equal(half_way.engine.rows.tokens, before)
    assert half_way.engine.rows.masked.sum(1).tolist() == [4, 4]
    second = half_way.take()
    assert torch.equal(first.forward.packed.positions, second.forward.packed.positions)
    assert torch.equal(first.forward.hidden, second.forward.hidden)


def counted(call) -> dict[str, int]:
    """Operations of what a call multiplies, by the operation of torch."""
    with FlopCounterMode(display=False) as counter:
        call()
    found = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    return {"linear": found.get("aten.mm", 0) + found.get("aten.addmm", 0), "attention": found.get("aten.bmm", 0)}


@pytest.mark.parametrize("kind", GOALS)
def test_products_are_those_of_the_step(plain, kind):
    half_way = HalfWay(options(plain), of_lineup(STEPS[kind]).settings)
    sizes = half_way.sizes()
    active, rows = sizes["active"], sizes["rows"]
    assert (active, rows) == (14 if kind == "full" else 5, 4)
    alone = products(plain, half_way)
    step, alone = counted(half_way.take), counted(lambda: [call() for call in alone.values()])
    assert step["linear"] == alone["linear"] > 0
    spec = plain.spec
    # Two products per layer, with the keys of all 14 slots; in the last layer with the queries of the outputs alone.
    assert alone["attention"] == 2 * 2 * 2 * spec.num_heads * spec.head_dim * 14 * (active + rows)


@pytest.mark.parametrize("name", ["llada-8b", "dream-7b"])
@pytest.mark.parametrize("policy", [dkv.SkipCache("1/4@1/4"), dkv.ElasticCache(), dkv.SuffixWindow(2), dkv.DualCache()])
def test_products_are_those_of_the_newer_policies(name, policy):
    """Where slots stop, layers that follow multiply fewer; where a pass is observed, all ask in the last one."""
    model = random_model(replace(tiny(shape(name)), num_layers=4), torch.device("cpu"), torch.float32)
    half_way = HalfWay(options(model, new=32, batch=1), {"cache": policy, "block_length": 16}, cached=True)
    alone, (through, outputs), observed = products(model, half_way), half_way.entries(), policy.name == "elastic"
    assert through[-1].leaving == outputs
    assert through[-1].asking == (through[-1].entering if observed else outputs)
    assert (through[2].entering < through[1].entering) == (policy.name == "skip")
    step, alone = counted(half_way.take), counted(lambda: [call() for call in alone.values()])
    # To observe takes products of its own, and those of attention are not left to SDPA.
    assert step["linear"] > alone["linear"] if observed else step["linear"] == alone["linear"]
    assert not observed or step["attention"] == alone["attention"]


@pytest.mark.parametrize("name", ["llada_moe", "llada2", "sdar"])
def test_products_are_those_of_experts_and_of_joined_layers(name):
    """Of a mixture the experts that the step chooses, router and shared expert among them."""
    spec = of_family(name, tiny(shape("llada-8b")))
    if spec.mixture is not None:
        mixture = replace(spec.mixture, experts=16, shared_width=12, dense_layers=(0,))
        spec = replace(spec, num_layers=3, mixture=mixture)
    for make in (lambda model: model, join_):
        model = make(random_model(spec, torch.device("cpu"), torch.float32))
        half_way = HalfWay(options(model), {})
        alone = products(model, half_way)
        step = counted(half_way.take)["linear"]
        half_way.back()
        assert step == counted(half_way.take)["linear"]
        assert step == counted(lambda calls=alone: [call() for call in calls.values()])["linear"] > 0


def test_rows(plain, monkeypatch):
    monkeypatch.setattr(floor, "ROUNDS", 4)
    found = measure(options(as_loaded(plain)))
    assert [row["kind"] for row in found["rows"]] == list(GOALS)
    for row in found["rows"]:
        assert list(row["parts"]) == list(PARTS)
        assert all(ms > 0 for ms in row["parts"].values())
        assert set(row["products"]) < set(PARTS)
        assert row["lowest"] <= row["ratio"] <= row["highest"]
        assert row["slots"] == 14 and row["rows"] == 4
    text = table(found)
    assert text.count("goal 1.15") == text.count("goal 1.10") == 1


def test_recording_leaves_nothing_behind(plain):
    model = as_loaded(plain)
    half_way = HalfWay(options(model), {})
    with recorded(model) as seconds:
        half_way.take()
    before = dict(seconds)
    half_way.back()
    half_way.take()
    assert dict(seconds) == before
    assert "forward" not in vars(model.head)


def test_the_table_names_what_misses_its_goal():
    row = {
        "kind": "cached",
        "slots": 10,
        "active": 4,
        "rows": 3,
        "batch": 1,
        "step_ms": 12.0,
        "floor_ms": 10.0,
        "ratio": 1.2,
        "lowest": 1.1,
        "highest": 1.3,
        "parts": dict.fromkeys(PARTS, 1.5) | {"MLP": 8.0},
        "products": {"MLP": 5.0},
        "linear_floor_ms": 20.0,
        "linear_ratio": 0.6,
    }
    text = table({"rows": [row]})
    assert "goal 1.10: missed by 0.10" in text
    assert "not packed: 20.00 ms; step / those: 0.60" in text
    assert f"MLP 30.0% ({PARTS['MLP']})" in text
    assert floor.table({"rows": [row | {"ratio": 1.05}]}).count("reached") == 1
