"""Steps that are replayed: on a CPU from tapes, which refuse what a CUDA graph cannot capture."""

import gc
import weakref

import pytest
import torch

import dkv
from dkv.core.sequences import MULTIPLES
from dkv.core.varlen import Padding
from dkv.engine import engine, graphs
from dkv.engine.plan import Planner
from dkv.engine.replay import replay
from dkv.engine.run import Run
from dkv.tools import verify_policies
from dkv.tools.verify import FAST_DLLM, dream_settings, llada_settings, recorded_numbers
from tests.dkv.conftest import pad_rows
from tests.dkv.engine.tape import TapeRunner
from tests.dkv.engine.test_golden import CASES, models, name_of  # noqa: F401
from tests.dkv.engine.test_golden_policies import CASES as NEWER
from tests.dkv.engine.test_golden_policies import models as newer_models  # noqa: F401
from tests.kernels.sweeps import sweep
from tests.waits import Waits

POLICIES = (
    *("none", "decode", "greedy", "prefill", "pd", "prefix", "dual", "skip", "rollout", "elastic"),
    {"name": "suffix", "window": 3},
)


@pytest.fixture
def taped(monkeypatch):
    """Generations on the CPU that pad as on a GPU and replay from tapes."""
    monkeypatch.setitem(graphs.RUNNERS, "cpu", TapeRunner)
    monkeypatch.setattr(TapeRunner, "captured", 0)
    monkeypatch.setattr(graphs, "_kept", weakref.WeakKeyDictionary())
    monkeypatch.setattr(graphs, "LEAST_AHEAD", 1)
    monkeypatch.setattr("dkv.kernels.common.operation.readable", lambda _: False)
    return TapeRunner


def settings_of(case):
    if "policy" in case.facts:
        return verify_policies.settings_of(case)
    if "function" in case.facts:
        f = case.facts
        rule = "steps" if f["threshold"] is None else "threshold"
        settings = {name: f[name] for name in ("gen_length", "block_length", rule)}
        return settings | {"cache": FAST_DLLM[f["function"]], "schedule": "blocks"}
    return {"llada": llada_settings, "dream": dream_settings}[case.facts["family"]](case)


# The ends of a run that is named after them are those of the published code, which are looked for in Python.
RUNS = [
    case
    for case in (*CASES, *NEWER)
    if not (case.defect or case.facts.get("variant") == "forward" or case.name.endswith("_end"))
]


# Every sixth in the quick run: all policies and rules are among them.
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if i % 6 else (), id=name_of(c)) for i, c in enumerate(RUNS)]
)
def test_golden_runs(case, models, newer_models, taped):  # noqa: F811
    t, model = case.tensors, {**models, **newer_models}[case.folder]
    numbers = recorded_numbers(t)
    output = replay(model, t["prompt"].long(), t.get("attention_mask"), numbers, **settings_of(case))
    assert torch.equal(output.sequences, t["final"].long())
    assert output.stats.eager_reason is None
    assert output.stats.replayed_passes or output.stats.passes < 8


SETTINGS = [
    {},
    {"steps": 14},
    {"threshold": 0.3},
    {"threshold": 0.5, "threshold_decay": 0.5},
    {"factor": 1.5},
    {"entropy_bound": 4.0},
    {"entropy_bound": 3.0, "entropy_form": "code"},
    {"threshold": 0.3, "near_threshold": 0.2, "radius": 1},
    {"eos_token_id": [7, 9, 11, 30], "pad_token_id": 0},
    {"max_new_tokens": [19, 12, 9]},
    {"cfg_scale": 1.5},
    {"temperature": 0.8, "top_k": 20},
    {"selection_temperature": 0.5},
    {"confidence": "random"},
    {"certainty": 4, "threshold": 0.2},
    {"confidence": "entropy", "block_length": 7},
    {"block_length": 4},
    {"eos_token_id": [7, 9], "logits_eos_inf": True, "confidence_eos_eot_inf": True},
    {"schedule": "sliding", "block_length": 5, "most": 6, "steps": 14},
]
SLIDING = {"schedule": "sliding", "block_length": 5}
SLIDES = [("sliding", {**SLIDING, **how}) for how in ({}, {"threshold": 0.1, "most": 7}, {"cfg_scale": 1.5})]


@pytest.mark.parametrize(("policy", "settings"), [*sweep(POLICIES, SETTINGS, quick=8), *SLIDES])
def test_replayed_steps_are_the_eager_ones(model, policy, settings, taped, monkeypatch):
    ids, mask = pad_rows([[5, 9, 3, 8], [7, 2], [4, 4, 6]])
    if policy in ("rollout", "elastic", "skip") and settings.get("confidence") == "random":
        pytest.skip("needs a confidence to go by")
    if policy == "skip" and settings.get("schedule") == "sliding":
        pytest.skip("goes by blocks, which do not slide")
    call = {"attention_mask": mask, "max_new_tokens": 19, "cache": policy, "seed": 3, **settings}
    found = dkv.generate(model, ids, **call)
    assert found.stats.eager_reason is None and found.stats.replayed_passes
    monkeypatch.setenv("DKV_GRAPHS", "0")
    eager = dkv.generate(model, ids, **call)
    assert eager.stats.eager_reason == "DKV_GRAPHS=0" and not eager.stats.replayed_passes
    assert torch.equal(found.sequences, eager.sequences)
    for name in ("passes", "full_passes", "computed_slots", "total_slots", "new_tokens"):
        assert getattr(found.stats, name) == getattr(eager.stats, name), name


def test_what_a_graph_cannot_hold_is_taken_step_by_step(llada, taped):
    ids = torch.tensor([[1, 2, 3]])
    for reason, settings in {
        "records": {"output_history": True},
        "processor": {"logits_processor": lambda ids, scores: scores},
        "criteria": {"stopping_criteria": lambda ids, scores: torch.zeros(len(ids), dtype=torch.bool)},
    }.items():
        stats = dkv.generate(llada, ids, max_new_tokens=8, **settings).stats
        assert reason in stats.eager_reason and not stats.replayed_passes
    with dkv.use_backend("reference"):
        assert "reference" in dkv.generate(llada, ids, max_new_tokens=8).stats.eager_reason
    handle = llada.layers[0].register_forward_hook(lambda *_: None)
    assert "hooks" in dkv.generate(llada, ids, max_new_tokens=8).stats.eager_reason
    handle.remove()
    assert dkv.generate(llada, ids, max_new_tokens=8).stats.replayed_passes


def test_a_step_that_cannot_be_captured_is_taken_as_it_comes(llada, taped, monkeypatch):
    def capture(self, shape):
        raise RuntimeError("operation not permitted when stream is capturing")

    ids, call = torch.tensor([[1, 2, 3]]), {"max_new_tokens": 12, "cache": "decode", "seed": 0}
    expected = dkv.generate(llada, ids, **call)
    monkeypatch.setattr(TapeRunner, "capture", capture)
    found = dkv.generate(llada, ids, **call)
    assert expected.stats.replayed_passes and not found.stats.replayed_passes
    assert "could not be captured: operation not permitted" in found.stats.eager_reason
    assert torch.equal(found.sequences, expected.sequences)


def test_graphs_keep_the_memory_that_they_read(llada, taped):
    """Scratch memory and rotary tables are replaced by larger ones while graphs that read them are replayed."""
    held = []

    def look(engine):
        held.append([x.data_ptr() for read in engine.runner._held for x in read])

    run = Run.after_prompts(llada, torch.tensor([[1, 2, 3]]), None, dkv.DiffusionConfig(max_new_tokens=12, seed=0))[1]
    while run.engine.numbers:
        run.engine.step()
        if run.engine.numbers:
            look(run.engine)
    rope = [table.data_ptr() for table in llada.rope_tables(0)]
    assert held[-1] and set(rope) <= set(held[-1]) and len(held[-1]) >= len(held[0])


def test_a_generation_goes_before_the_collector_comes(llada, taped):
    """Keys and values hold much memory: they must not wait for the collector of cycles."""
    run = Run.after_prompts(llada, torch.tensor([[1, 2, 3]]), None, dkv.DiffusionConfig(max_new_tokens=12, seed=0))[1]
    for _ in range(5):
        run.engine.step()
    seen, runner = (weakref.ref(run.engine), weakref.ref(run.engine.cache)), weakref.ref(run.engine.runner)
    assert run.engine.stats.replayed_passes
    gc.collect()
    gc.disable()
    try:
        del run
        assert [one() for one in seen] == [None, None] and runner().free
        dkv.release_graphs(llada)
        assert runner() is None
    finally:
        gc.enable()


NEXT = [{}, {"threshold": 0.3, "eos_token_id": [7, 9]}, {"temperature": 0.8}]


@pytest.mark.parametrize(("policy", "settings"), [*sweep(POLICIES, NEXT, quick=4), ("sliding", SLIDING)])
def test_graphs_serve_the_next_generation(model, policy, settings, taped, monkeypatch):
    """Of the same settings, with other prompts of other lengths."""
    monkeypatch.setitem(MULTIPLES, "cpu", 64)
    call = {"max_new_tokens": 19, "cache": policy, "seed": 3, **settings}
    prompts = [pad_rows(rows) for rows in ([[5, 9, 3, 8], [7, 2]], [[3], [1, 6, 9]])] * 2
    found = []
    for ids, mask in prompts:
        output = dkv.generate(model, ids, mask, **call)
        found.append((output.sequences, output.stats.replayed_passes / output.stats.passes))
        del output  # and its keys and values
    assert found[0][1] < found[3][1]
    monkeypatch.setenv("DKV_GRAPHS", "0")
    for (ids, mask), (sequences, _) in zip(prompts, found, strict=True):
        assert torch.equal(sequences, dkv.generate(model, ids, mask, **call).sequences)


def test_keys_and_values_that_are_held_stay_as_they_are(llada, taped):
    ids, call = torch.tensor([[1, 2, 3]]), {"max_new_tokens": 12, "cache": "decode", "seed": 0}
    held = dkv.generate(llada, ids, **call).kv_cache
    before = [x.numbers.clone() for pair in held.layers.values() for x in pair]
    for other in (4, 5):
        dkv.generate(llada, ids + other, **call)
    assert all(map(torch.equal, before, [x.numbers for pair in held.layers.values() for x in pair]))
    # Taken over by another generation, whose graphs are its own.
    longer, kept = torch.cat((held.tokens[:, :7], torch.tensor([[9, 9]])), 1), list(graphs._kept[llada])
    continued = dkv.generate(llada, longer, kv_cache=held, **call)
    assert continued.stats.reused_slots and continued.stats.replayed_passes
    assert graphs._kept[llada] == kept


def test_few_runners_are_kept(llada, taped):
    for new in (12, 13, 14, 15):
        dkv.generate(llada, torch.tensor([[1, 2, 3]]), max_new_tokens=new)
        gc.collect()
    assert len(graphs._kept[llada]) == graphs.MOST_KEPT
    held = [dkv.generate(llada, torch.tensor([[1, 2, 3]]), max_new_tokens=new) for new in (16, 17, 18)]
    assert len(held) > len(graphs._kept[llada]) == graphs.MOST_KEPT


def test_what_graphs_are_made_for_is_kept_apart(llada, taped, monkeypatch):
    """Other settings, weights elsewhere, or another backend: no graph of before is replayed."""
    ids, call = torch.tensor([[1, 2, 3]]), {"max_new_tokens": 12, "seed": 0}

    def captured(**settings):
        before = taped.captured
        dkv.generate(llada, ids, **{**call, **settings})
        return taped.captured - before

    assert captured() and not captured()
    for settings in ({"temperature": 0.5}, {"cache": "decode"}, {"eos_token_id": 3}, {"pad_token_id": 5}):
        assert captured(**settings), settings
        dkv.release_graphs(llada)
    assert captured() and not captured()
    monkeypatch.setenv("DKV_BACKEND", "torch")
    assert captured()
    norm = llada.layers[0].attn_norm
    norm.weight = torch.nn.Parameter(norm.weight.clone(), requires_grad=False)
    assert captured()


def test_two_generations_at_once(llada, taped):
    ids, call = torch.tensor([[1, 2, 3]]), {"cache": "decode", "seed": 0}
    alone = [dkv.generate(llada, ids, max_new_tokens=new, **call).sequences for new in (12, 30)]
    both = [dkv.stream(llada, ids, max_new_tokens=new, **call) for new in (12, 30)]
    last = [None, None]
    while both[1] is not None:
        for i, drafts in enumerate(both):
            draft = next(drafts, None) if drafts is not None else None
            both[i], last[i] = (None, last[i]) if draft is None else (drafts, draft)
    assert all(torch.equal(one.sequences, other) for one, other in zip(last, alone, strict=True))
    assert all(one.stats.replayed_passes for one in last)


def test_sizes_of_a_pass():
    graphed, counts = engine.GRAPHED, (0, 1, 16, 17, 129, 256, 257, 321)
    assert [graphed.filled(count, 10**6) for count in counts] == [0, 16, 16, 32, 192, 256, 320, 384]
    assert graphed.filled(20, 25) == 25 and graphed.filled(20, 10) == 20
    assert [Padding(4).filled(count, 9) for count in (0, 1, 4, 5, 9)] == [0, 4, 4, 8, 9]


@pytest.mark.parametrize(
    "slip, message",
    [
        (lambda engine: engine.rows.masked.sum().item(), "waits for the device"),
        (lambda engine: engine.rows.masked.tolist(), "tolist reads"),
        (lambda engine: engine.rows.tokens.add_(torch.tensor([0])), "uploaded"),
        (lambda engine: engine.rows.tokens[engine.rows.tokens > 0], "boolean index waits"),
        (lambda engine: setattr(engine, "seen", engine.seen.clone()), "new tensors for Engine.seen"),
    ],
)
def test_what_a_graph_cannot_capture_is_noticed(llada, taped, monkeypatch, slip, message):
    commit = engine.Engine.commit
    monkeypatch.setattr(engine.Engine, "commit", lambda self, *args: (slip(self), commit(self, *args)))
    with pytest.raises(Waits, match=message):
        dkv.generate(llada, torch.tensor([[1, 2, 3]]), max_new_tokens=8)


def test_a_number_of_the_host_in_a_step_is_noticed(llada, taped, monkeypatch):
    """It is baked in when the step is recorded: tokens of later steps then differ from those of eager steps."""
    score = Planner.score

    def by_clock(self, confidence, now, packed=None):
        return score(self, confidence, now, packed) * (1.0 if len(taped_steps) % 2 else -1.0)

    taped_steps = []
    commit = engine.Engine.commit
    monkeypatch.setattr(Planner, "score", by_clock)
    monkeypatch.setattr(engine.Engine, "commit", lambda self, *args: (taped_steps.append(1), commit(self, *args)))
    ids = torch.tensor([[1, 2, 3]])
    found = dkv.generate(llada, ids, max_new_tokens=12)
    monkeypatch.setenv("DKV_GRAPHS", "0")
    taped_steps.clear()
    assert not torch.equal(found.sequences, dkv.generate(llada, ids, max_new_tokens=12).sequences)
