"""The eager baseline: the tokens of dkv and of the published code's recorded runs, at the published work."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dkv
from dkv.bench.baselines.dkv_cache import generate
from dkv.bench.shapes import as_loaded, random_model, shape, tiny
from dkv.engine.replay import replay
from dkv.models.packing import can_pack
from dkv.tools.verify import find_cases, llada_settings, recorded_numbers

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [
    case
    for case in find_cases(GOLDEN)
    if case.facts.get("variant") in ("origin", "decode", "greedy") and not case.defect
]

CPU = torch.device("cpu")
RANDOM = {"confidence": "random"}
SETTINGS = {
    "plain": {},
    "plain, 2 blocks": {"block_length": 12},
    "plain, few steps": {"steps": 10, "block_length": 12},
    "plain, random": RANDOM,
    "decode 1": {"cache": dkv.DecodeCache(1)},
    "decode 3": {"cache": dkv.DecodeCache(3)},
    "decode 8, 3 blocks": {"cache": dkv.DecodeCache(8), "block_length": 8},
    "decode 4, few steps": {"cache": dkv.DecodeCache(4), "steps": 10, "block_length": 12},
    "decode never, more steps than slots": {"cache": dkv.DecodeCache(None), "steps": 40},
    "decode 4, last block short": {"cache": dkv.DecodeCache(4), "block_length": 10},
    "decode 4, random": {"cache": dkv.DecodeCache(4), **RANDOM},
    "greedy 1": {"cache": dkv.GreedyCache(1), **RANDOM},
    "greedy 4": {"cache": dkv.GreedyCache(4), **RANDOM},
    "greedy 4, no window": {"cache": dkv.GreedyCache(4, 0), **RANDOM},
    "greedy 3, wide window, 3 blocks": {"cache": dkv.GreedyCache(3, 9), "block_length": 8, **RANDOM},
    "greedy 5, few steps": {"cache": dkv.GreedyCache(5, 3), "steps": 9, "block_length": 12, **RANDOM},
    "greedy never": {"cache": dkv.GreedyCache(None, 2), **RANDOM},
}
CACHED = [name for name, kw in SETTINGS.items() if getattr(kw.get("cache"), "refresh", 1) != 1]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["as many K/V heads", "fewer K/V heads"])
def model(request):
    spec = tiny(shape("llada-8b"))
    if request.param == "fewer K/V heads":
        spec = replace(spec, num_kv_heads=2)
    return random_model(spec, CPU, torch.float32, std=0.22)


@pytest.fixture(scope="module")
def golden():
    return {folder: dkv.load(folder, device="cpu", pack=False) for folder in {case.folder for case in CASES}}


def prompts(batch: int = 1) -> torch.Tensor:
    return torch.randint(255, (batch, 7), generator=torch.Generator().manual_seed(3))


def rows_of(model, run) -> tuple[torch.Tensor, list[int]]:
    """What `run` returns, and how many slots of a row went through the head in each pass."""
    rows: list[int] = []
    hook = model.head.register_forward_hook(lambda head, args, out: rows.append(out.shape[1]))
    try:
        return run(), rows
    finally:
        hook.remove()


@pytest.mark.parametrize("name", SETTINGS)
def test_same_tokens_and_slots_as_dkv(model, name):
    """One row where heads are grouped, as in half of the recorded runs, else two."""
    ids, settings = prompts(1 if model.spec.num_kv_heads < model.spec.num_heads else 2), SETTINGS[name]
    expected = dkv.generate(model, ids, max_new_tokens=24, seed=0, output_active=True, **settings)
    found, rows = rows_of(model, lambda: generate(model, ids, new=24, **settings))
    assert found.dtype == torch.int64 and torch.equal(found, expected.sequences)
    assert rows == expected.active[:, 0].sum(1).tolist()


@pytest.mark.parametrize("name", CACHED)
def test_stale_keys_change_tokens(model, name):
    """Otherwise equal tokens would not show that the lists hold what they should."""
    settings = SETTINGS[name]
    plain = {k: v for k, v in settings.items() if k != "cache"}
    ids = prompts(2)
    assert not torch.equal(generate(model, ids, new=24, **settings), generate(model, ids, new=24, **plain))


def test_numbers_are_those_given(model):
    def numbers(step, size):
        return torch.rand(size, generator=torch.Generator().manual_seed(step))

    settings = {"cache": dkv.GreedyCache(4, 2), "block_length": 12, "numbers": numbers, **RANDOM}
    expected = replay(model, prompts(2), max_new_tokens=24, **settings).sequences
    assert torch.equal(generate(model, prompts(2), new=24, **settings), expected)
    assert not torch.equal(generate(model, prompts(2), new=24, **{**settings, "numbers": None}), expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.folder.name}/{case.name}")
def test_golden(case, golden):
    t, model, settings = case.tensors, golden[case.folder], llada_settings(case)
    kept = {name: settings[name] for name in ("cache", "steps", "block_length")}
    assert settings["temperature"] == 0 and settings["mask_id"] == model.spec.mask_token_id
    kept["confidence"] = {"low_confidence": "probability"}.get(settings["remasking"], settings["remasking"])
    found, rows = rows_of(
        model,
        lambda: generate(model, t["prompt"].long(), new=settings["gen_length"], numbers=recorded_numbers(t), **kept),
    )
    assert torch.equal(found, t["final"].long())
    assert rows == t["active"][:, 0].sum(1).tolist()


def test_golden_holds_all_three_variants():
    assert {case.facts["variant"] for case in CASES} == {"origin", "decode", "greedy"}
    assert {case.folder.name for case in CASES} == {"llada_mha", "llada_gqa"}


@pytest.mark.parametrize(
    ("name", "full"),
    [("plain", {0, 1, 2, 3, 4, 5}), ("decode 3", {0, 1, 3}), ("greedy 4", {0, 4}), ("greedy never", {0})],
)
def test_on_step_tells_full_steps_and_their_seconds(model, name, full):
    steps = []
    generate(model, prompts(), new=6, on_step=lambda *step: steps.append(step), **SETTINGS[name])
    assert len(steps) == 6 and {i for i, step in enumerate(steps) if step[0]} == full
    assert all(isinstance(seconds, float) and seconds > 0 for _, seconds in steps)


def test_nothing_to_fill_gives_the_prompt(model):
    assert torch.equal(generate(model, prompts(2), new=0), prompts(2))


def test_mask_is_never_chosen(model):
    """The mask is made the best token of every slot: it is passed over, as in dkv."""
    with torch.no_grad():
        before = model.head.weight[model.spec.mask_token_id].clone()
        others = model.head.weight[: model.spec.mask_token_id]
        try:
            # Beside the hidden state of a masked slot, so that its logit is far above the others.
            model.head.weight[model.spec.mask_token_id] = 5 * others[generate(model, prompts(), new=1)[0, -1]]
            ids, settings = prompts(2), {"cache": dkv.DecodeCache(4)}
            found = generate(model, ids, new=12, **settings)
            assert torch.equal(found, dkv.generate(model, ids, max_new_tokens=12, **settings).sequences)
            assert not (found == model.spec.mask_token_id).any()
        finally:
            model.head.weight[model.spec.mask_token_id] = before


def test_bfloat16_runs_in_its_dtype():
    model = random_model(tiny(shape("llada-8b")), CPU, torch.bfloat16, std=0.22)
    found = generate(model, prompts(2), new=8, cache=dkv.DecodeCache(3))
    assert found.shape == (2, 15) and not (found == model.spec.mask_token_id).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": dkv.PrefillCache()}, "cache must be NoCache"),
        ({"cache": dkv.PrefillDecodeCache(4)}, "cache must be NoCache"),
        ({"cache": dkv.DecodeCache(4, warmup=1)}, "cache must be NoCache"),
        ({"cache": dkv.GreedyCache(4, window_center="last"), **RANDOM}, "cache must be NoCache"),
        ({"cache": dkv.GreedyCache(4)}, 'confidence="random"'),
        ({"cache": "nothing"}, "unknown policy 'nothing'"),
        ({"confidence": "entropy"}, "confidence must be"),
        ({"confidence": "surest"}, "confidence must be"),
        ({"new": -1}, "new must be"),
        ({"new": 2.0}, "new must be"),
        ({"steps": 0}, "steps must be"),
        ({"steps": 1, "block_length": 4}, "steps"),
        ({"numbers": lambda step, size: torch.rand(3), **RANDOM}, "numbers must return"),
    ],
)
def test_impossible_settings_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts(), **{"new": 8, **settings})


def test_unfit_models_and_prompts_are_refused(model):
    ids = prompts()
    for changes, message in (({"shifted": True}, "LLaDA's kind"), ({"qk_norm": True}, "LLaDA's kind")):
        other = random_model(replace(model.spec, **changes), CPU, torch.float32)
        with pytest.raises(ValueError, match=message):
            generate(other, ids, new=4)
    with pytest.raises(ValueError, match=r"nn\.Linear"):
        generate(object(), ids, new=4)
    with pytest.raises(ValueError, match="must not hold the mask"):
        generate(model, torch.full((1, 3), model.spec.mask_token_id), new=4)
    with pytest.raises(IndexError, match="input_ids"):
        generate(model, ids + 1000, new=4)
    with pytest.raises(ValueError, match="positions"):
        generate(model, ids, new=5000)


@pytest.mark.skipif(not can_pack(), reason="this build of PyTorch does not pack weights")
def test_packed_models_are_refused(model):
    with pytest.raises(ValueError, match=r"nn\.Linear"):
        generate(as_loaded(model), prompts(), new=4)
