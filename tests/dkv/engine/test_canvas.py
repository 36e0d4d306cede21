"""Canvases of DiffusionGemma: recorded runs, rows by themselves, ends, streams and settings."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import dkv
from dkv.engine.canvas import CanvasRun
from dkv.engine.canvas_settings import settings_of
from dkv.engine.denoise import accepted, numbers, think
from dkv.engine.noise import text_keys
from dkv.tools.recorded import Mismatch, find_cases
from dkv.tools.verify_gemma import check_gemma

FAMILY = Path(__file__).parents[2] / "golden" / "families" / "diffusion_gemma"
CASES = find_cases(FAMILY)
END, PAD = 1, 0


@pytest.fixture(scope="module")
def gemma():
    return dkv.load(FAMILY / "gemma_tiny", device="cpu")


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 190, (1, length), generator=torch.Generator().manual_seed(seed))


def call(model, ids, mask=None, **settings):
    settings = {"max_new_tokens": 16, "max_denoising_steps": 5, "entropy_bound": 1.0, "seed": 3, **settings}
    return dkv.generate(model, ids, mask, **settings)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_recorded(case, gemma):
    check_gemma(case, gemma)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_backends(backend, gemma):
    case = next(case for case in CASES if case.facts["kind"] == "forward")
    with dkv.use_backend(backend):
        check_gemma(case, gemma)


def test_a_recorded_run_with_another_rule_is_noticed(gemma, monkeypatch):
    case = next(case for case in CASES if case.name.startswith("p13_n16"))
    monkeypatch.setattr("dkv.engine.canvas.accepted", lambda entropy, bound: entropy < bound)
    with pytest.raises(Mismatch, match="accepted"):
        check_gemma(case, gemma)


def test_a_row_gets_what_it_gets_alone(gemma):
    texts, width = [prompt(n, seed=n) for n in (9, 4, 13)], 13
    for left in (True, False):
        ids, mask = torch.full((3, width), 7), torch.zeros(3, width, dtype=torch.long)
        for row, text in enumerate(texts):
            n = text.shape[1]
            at = slice(width - n, width) if left else slice(n)
            ids[row, at], mask[row, at] = text[0], 1
        # Rows finish apart, and end apart: ids below 60 are ends here.
        how = {"max_new_tokens": 32, "eos_token_id": list(range(2, 12)), "confidence_threshold": 2.0, "seed": [5, 6, 7]}
        how |= {"stability_threshold": 0, "t_min": 0.1, "t_max": 0.3, "max_denoising_steps": 6}
        together = call(gemma, ids, mask, **how).sequences[:, width:]
        for row, text in enumerate(texts):
            alone = call(gemma, text, **{**how, "seed": 5 + row}).sequences[0, text.shape[1] :]
            assert torch.equal(together[row, : len(alone)], alone)
            assert (together[row, len(alone) :] == PAD).all()


def test_finished_rows_are_not_computed(gemma):
    one, two = prompt(9), prompt(9, seed=1)
    seen = []
    how = {"max_new_tokens": 8, "stability_threshold": 0, "confidence_threshold": 1.5, "t_min": 0.1, "seed": 0}
    settings = settings_of(gemma.spec, None, how)
    ids = torch.cat((one, two))
    run = CanvasRun(gemma, ids, torch.ones_like(ids, dtype=torch.bool), settings, on_step=seen.append)
    run.to_the_end(None, ids, 0)
    alive = [len(step.rows) for step in seen]
    assert {1, 2} == set(alive) and alive == sorted(alive, reverse=True)
    assert run.stats.computed_slots == ids.numel() + 8 * sum(alive)
    for before, after in pairwise(seen):
        assert torch.equal(after.rows, before.rows[~before.finished])


def test_what_stands_behind_the_end_is_padding(gemma):
    ids = prompt(9)
    free = call(gemma, ids, eos_token_id=[], max_new_tokens=24).sequences[0, 9:]
    assert len(free) == 24
    end = int(free[3])
    first = free.tolist().index(end)
    ended = call(gemma, ids, eos_token_id=end, max_new_tokens=24)
    assert ended.sequences[0, 9:].tolist() == [*free[: first + 1].tolist(), *[PAD] * (7 - first)]
    assert ended.stats.new_tokens == first + 1


def test_whole_canvases_are_written(gemma):
    assert call(gemma, prompt(5), max_new_tokens=9, eos_token_id=[]).sequences.shape == (1, 5 + 16)
    assert call(gemma, prompt(5), max_length=13, max_new_tokens=None, eos_token_id=[]).sequences.shape == (1, 5 + 8)
    assert torch.equal(call(gemma, prompt(5), max_new_tokens=0).sequences, prompt(5))
    assert call(gemma, prompt(5)[:, :0], max_new_tokens=8, eos_token_id=[]).sequences.shape == (1, 8)


def test_the_text_before_a_canvas_is_encoded_once(gemma, monkeypatch):
    widths = []
    encode = type(gemma).encode
    monkeypatch.setattr(
        type(gemma), "encode", lambda self, ids, *rest: widths.append(ids.shape[1]) or encode(self, ids, *rest)
    )
    call(gemma, prompt(9), max_new_tokens=24, eos_token_id=[])
    assert widths == [9, 8, 8]


def test_the_next_turn_of_a_talk_computes_what_is_new(gemma):
    ids, mask = torch.cat((prompt(130), prompt(130, seed=1))), torch.ones(2, 130, dtype=torch.long)
    mask[1, :125] = 0
    first = call(gemma, ids, mask, seed=[1, 2], max_new_tokens=24, eos_token_id=[])
    more = prompt(5, seed=2).repeat(2, 1)
    # The second row says something else than the model did.
    turn = torch.cat((first.sequences, more), 1)
    turn[1, 140] = 3 if int(turn[1, 140]) != 3 else 4
    mask = torch.cat((mask, torch.ones(2, 29, dtype=torch.long)), 1)
    how = {"seed": [3, 4], "eos_token_id": []}
    again = call(gemma, turn, mask, kv_cache=first.kv_cache, **how)
    assert torch.equal(again.sequences, call(gemma, turn, mask, **how).sequences)
    # The last canvas was not encoded, as nothing followed it.
    assert again.stats.reused_slots == 130 + 16 + (140 - 125)
    with pytest.raises(ValueError, match="has 2 rows, the call has 1"):
        call(gemma, prompt(9), kv_cache=first.kv_cache)


def test_ids_without_text_are_not_written(gemma, monkeypatch):
    monkeypatch.setattr(gemma, "spec", replace(gemma.spec, vocab_limit=40))
    seen = []
    ids = prompt(9) % 40
    run = CanvasRun(gemma, ids, torch.ones_like(ids, dtype=torch.bool), settings_of(gemma.spec, None, {"seed": 0}))
    run.on_step = seen.append
    for _ in zip(range(5), run.steps(), strict=False):
        pass
    assert all(int(ids.max()) < 40 for step in seen for ids in (step.before, step.after, step.thought.best))


def test_seeds(gemma):
    ids = prompt(9).repeat(2, 1)
    first, second = call(gemma, ids, seed=[1, 2]).sequences
    assert not torch.equal(first, second)
    assert torch.equal(call(gemma, ids, seed=[2, 2]).sequences[0], second)
    drawn = call(gemma, ids, seed=None, generator=torch.Generator().manual_seed(0))
    assert torch.equal(call(gemma, ids, seed=drawn.stats.seed).sequences, drawn.sequences)


def test_streams(gemma):
    class Streamer:
        def __init__(self):
            self.put_ids, self.drafts, self.ended = [], [], 0

        def put(self, ids):
            self.put_ids.append(ids)

        def put_draft(self, ids):
            self.drafts.append(ids)

        def end(self):
            self.ended += 1

    streamer, ids = Streamer(), prompt(9)
    output = call(gemma, ids, streamer=streamer, eos_token_id=[], output_history=True)
    assert torch.equal(streamer.put_ids[0], ids) and torch.equal(streamer.put_ids[1], output.sequences[:, 9:])
    assert [draft.shape[1] for draft in streamer.drafts] == [8] * 5 + [16] * 5 and streamer.ended == 1
    assert torch.equal(streamer.drafts[-1], output.sequences[:, 9:])
    drafts = list(
        dkv.stream(gemma, ids, max_new_tokens=16, max_denoising_steps=5, entropy_bound=1.0, seed=3, eos_token_id=[])
    )
    assert all(torch.equal(a.sequences[:, 9:], b) for a, b in zip(drafts, streamer.drafts, strict=False))
    assert torch.equal(drafts[-1].sequences, output.sequences) and len(drafts) == 11
    assert [draft.stats.passes for draft in drafts] == [*range(1, 11), 10]
    assert output.history.shape == (10, 1, 25) and torch.equal(output.history[-1], output.sequences)


def test_drafts_are_drawn(gemma, capsys):
    tokenizer = type("Tokenizer", (), {"eos_token_id": END, "decode": lambda self, ids, **_: " ".join(map(str, ids))})()
    streamer = dkv.DraftStreamer(tokenizer, gemma.spec)
    output = call(gemma, prompt(9), streamer=streamer, eos_token_id=[])
    assert capsys.readouterr().out.rstrip().endswith(str(int(output.sequences[0, -1])))


def test_what_is_random(gemma):
    keys = text_keys([torch.tensor([1, 2]), torch.tensor([3])], [0, 0])
    first, again, other = (numbers(keys, canvas, 3, 8, 192) for canvas in (0, 0, 1))
    assert first.start.shape == (2, 8) and first.renewed.shape == first.uniform.shape == (3, 2, 8)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert not torch.equal(first.start, other.start) and not torch.equal(first.renewed[0], first.renewed[1])
    assert int(first.renewed.max()) < 192 and int(first.renewed.min()) >= 0
    # A row's numbers do not depend on how many steps or rows there are.
    alone = numbers(keys[1:], 0, 3, 8, 192)
    assert torch.equal(alone.uniform[:, 0], first.uniform[:, 1])


def test_what_is_thought(gemma, monkeypatch):
    hidden = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(2, 8, generator=torch.Generator().manual_seed(1))
    thought = think(gemma, hidden, 0.5, uniform)
    p = (gemma.logits(hidden).double() / 0.5).softmax(-1)
    assert torch.equal(thought.best, p.argmax(-1))
    torch.testing.assert_close(thought.entropy.double(), -(p * p.log()).sum(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(thought.soft.double(), p @ gemma.embed.weight.double() * 8, atol=1e-4, rtol=1e-4)
    below = p.cumsum(-1).gather(-1, thought.drawn[..., None]).squeeze(-1)
    drawn = p.gather(-1, thought.drawn[..., None]).squeeze(-1)
    assert ((uniform < below + 1e-5) & (uniform > below - drawn - 1e-5)).all()
    monkeypatch.setattr("dkv.engine.denoise.MOST_LOGITS", 3 * 192)
    assert torch.equal(think(gemma, hidden, 0.5, uniform).drawn, thought.drawn)


def test_what_is_accepted():
    entropy = torch.tensor([[0.5, 0.05, 0.06, 0.04], [9.0, 8.0, 7.0, 9.0], [0.0, 0.0, 0.0, 0.0]])
    expected = [[False, True, True, True], [False, False, True, False], [True] * 4]
    assert accepted(entropy, 0.1).tolist() == expected


REFUSED = [
    ({"cache": "decode"}, "every input does"),
    ({"cache": dkv.DualCache()}, "cached exactly, always"),
    ({"block_length": 8}, "the blocks are canvases"),
    ({"threshold": 0.9}, "entropy_bound says"),
    ({"temperature": 0.5}, "t_max to t_min"),
    ({"cfg_scale": 1.0}, "guidance"),
    ({"schedule": "time"}, "one schedule"),
    ({"refresh": 3}, "no masks"),
    ({"mask_token_id": 3}, "no masks"),
    ({"confidence_treshold": 0.1}, "did you mean 'confidence_threshold'"),
    ({"max_denoising_steps": 0}, "max_denoising_steps must be"),
    ({"max_new_tokens": -1}, "max_new_tokens must be"),
    ({"entropy_bound": -0.1}, "entropy_bound must be"),
    ({"t_min": 0.9}, "t_max must be"),
    ({"t_min": 0, "t_max": 0}, "t_max must be"),
    ({"stability_threshold": 0.5}, "stability_threshold must be"),
    ({"eos_token_id": 192}, "eos_token_id must be at most 191"),
    ({"eos_token_id": -1}, "eos_token_id must be"),
    ({"seed": [1, 2]}, "seed is a list of 2"),
    ({"seed": 0.5}, "seed must be"),
    ({"max_new_tokens": 600}, "need 609 positions, the model has 512"),
    ({"logits_processor": print}, "input of the next"),
    ({"stopping_criteria": print}, "eos_token_id"),
    ({"kv_cache": dkv.KVCache(1, 9)}, "kv_cache of an output"),
    ({"generator": torch.Generator(), "seed": 1}, "both sources"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[next(iter(settings)) for settings, _ in REFUSED])
def test_what_means_nothing_is_refused(gemma, settings, message):
    with pytest.raises(ValueError, match=message):
        dkv.generate(gemma, prompt(9), **settings)


def test_what_else_is_refused(gemma):
    with pytest.raises(ValueError, match="no masks to fill"):
        dkv.infill(gemma, prompt(9), mask_token_id=4)
    with pytest.raises(TypeError, match="streamer"):
        dkv.generate(gemma, prompt(9), streamer=3)
    with pytest.raises(TypeError, match="generation_config must be"):
        dkv.generate(gemma, prompt(9), generation_config=3)


def test_names_of_other_configurations(gemma):
    spec = gemma.spec
    config = dkv.DiffusionConfig(max_new_tokens=32, steps=7, entropy_bound=0.3, seed=4, cache="none")
    found = settings_of(spec, config, {})
    assert (found.max_new_tokens, found.max_denoising_steps, found.entropy_bound, found.seed) == (32, 7, 0.3, 4)
    assert settings_of(spec, dkv.DiffusionConfig(), {}).max_new_tokens == 128
    assert settings_of(spec, dkv.DiffusionConfig(max_length=40), {}, columns=9).max_new_tokens == 31
    assert settings_of(spec, {"t_min": 0.1}, {"t_max": 0.2}) == settings_of(spec, None, {"t_min": 0.1, "t_max": 0.2})
    plain = settings_of(spec, None, {"use_cache": True, "temperature": 0.0, "cache": None})
    assert plain == settings_of(spec, None, {}) and plain.eos_token_id == (END,) and plain.pad_token_id == PAD
    with pytest.raises(ValueError, match="block_length"):
        settings_of(spec, dkv.DiffusionConfig(block_length=8), {})


def test_the_configuration_of_transformers(gemma):
    module = pytest.importorskip("transformers", minversion="5.24").models.diffusion_gemma.generation_diffusion_gemma
    theirs = module.DiffusionGemmaGenerationConfig(
        max_denoising_steps=9, sampler_config=module.EntropyBoundSamplerConfig(entropy_bound=0.4), eos_token_id=[1, 5]
    )
    found = settings_of(gemma.spec, theirs, {"t_min": 0.3})
    assert (found.max_denoising_steps, found.entropy_bound, found.eos_token_id, found.t_min) == (9, 0.4, (1, 5), 0.3)
