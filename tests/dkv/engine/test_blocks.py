"""Block-causal models: what is computed, stored and seen, alone and in company."""

from dataclasses import replace

import pytest
import torch

import dkv
from dkv.policies import POLICIES
from tests.dkv.conftest import pad_rows, small_model

MASK = 63
PROMPTS = [[5, 9, 3, 8, 1, 44, 17], [7, 2, 4], [4, 4, 6, 12, 30, 31, 32, 33, 8]]
KINDS = {
    "slots": {},
    "prompt": {"blocks_from_prompt": True},
    "shifted": {"shifted": True},
    "seeded": {"shifted": True, "seeded": True},
    "causal": {"attention": "prefix_causal", "blocks_from_prompt": True, "seeded": True},
}
SETTINGS = [
    {},
    {"cache": "decode"},
    {"cache": "dual", "block_length": 2},
    {"cache": {"name": "dual", "delayed": True}, "block_length": 2},
    {"threshold": 0.05},
    {"threshold": 0.05, "steps": 9},
    {"steps": 9, "cache": dkv.DecodeCache(None)},
    {"confidence": "sequential", "steps": 12},
    {"confidence": "random", "temperature": 0.7},
    {"entropy_bound": 4.0, "cache": "decode"},
    {"quotas": "rounded", "steps": 12},
    {"edit_threshold": 0.02, "threshold": 0.05, "post_steps": 3},
    {"edit_threshold": 0.0, "post_steps": 1, "eos_token_id": [3, 7, 11, 50]},
    {"eos_token_id": [3, 7, 11, 50]},
]


@pytest.fixture(params=KINDS)
def model(request):
    return small_model(**{"attention": "block", "block_length": 4, **KINDS[request.param]})


def fits(model, settings):
    spec = model.spec
    return "edit_threshold" not in settings or not (spec.shifted or spec.seeded or spec.blocks_from_prompt)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_batch_is_its_rows(model, settings):
    if not fits(model, settings):
        pytest.skip("is refused")
    ids, mask = pad_rows(PROMPTS)
    call = {"seed": 3, "output_active": True, **settings}
    budgets = [11, 14, 9]
    output = dkv.generate(model, ids, mask, max_new_tokens=budgets, **call)
    assert output.sequences.shape[1] == ids.shape[1] + 14
    new = output.sequences[:, ids.shape[1] :]
    for row, (prompt, budget) in enumerate(zip(PROMPTS, budgets, strict=True)):
        alone = dkv.generate(model, torch.tensor([prompt]), max_new_tokens=budget, **call)
        assert torch.equal(new[row, :budget], alone.sequences[0, len(prompt) :])
        assert not (new[row, :budget] == MASK).any()
        slots = output.active[: len(alone.active), row, ids.shape[1] - len(prompt) :][:, : len(prompt) + budget]
        assert torch.equal(slots, alone.active[:, 0])


def whole(model, tokens, prompt):
    """The logits of a text from nothing, as a block-causal model sees it."""
    slot = torch.arange(len(tokens))
    offset = -prompt % 4 if model.spec.blocks_from_prompt else 0
    blocks = (slot + offset) // 4
    if model.spec.attention == "prefix_causal":
        # Before the block that is filled, every slot is a block of its own.
        first = int((slot[tokens == MASK][0] + offset) // 4 * 4 - offset)
        blocks = torch.where(slot < first, slot, first)
    return model(tokens[None], block_ids=blocks[None])[0]


def test_block_only_passes_are_exact(model):
    """Every pass gives what the whole text gives, computed anew: tokens are the surest ones of that."""
    if model.spec.shifted or model.spec.seeded:
        pytest.skip("has other slots for its first ones")
    prompt = torch.tensor(PROMPTS[2])
    output = dkv.generate(model, prompt[None], max_new_tokens=12, output_history=True, eos_token_id=[])
    size = len(prompt) + (12 if model.spec.blocks_from_prompt else 15)
    tokens = torch.cat((prompt, torch.full((size - len(prompt),), MASK)))
    for canvas in output.history[:, 0]:
        # How sure a token is, is told with the mask among the others; it is never emitted.
        sure, best = whole(model, tokens, len(prompt)).log_softmax(-1)[:, :MASK].max(-1)
        offset = -len(prompt) % 4 if model.spec.blocks_from_prompt else 0
        masked = tokens == MASK
        block = (torch.arange(size) + offset) // 4
        masked &= block == block[masked][0]
        at = int(torch.where(masked, sure, -torch.inf).argmax())
        tokens[at] = best[at]
        assert torch.equal(canvas, tokens[: len(canvas)])


def test_what_is_computed_of_a_block():
    model = small_model(attention="block", block_length=4)
    ids = torch.tensor([PROMPTS[0]])  # 7 slots: the last one stands in the block that is filled first.
    output = dkv.generate(model, ids, max_new_tokens=9, output_active=True)
    computed = [active.nonzero()[:, 0].tolist() for active in output.active[:, 0]]
    assert computed == [
        list(range(8)),  # The prompt is stored by the pass that fills the first block.
        *[list(range(4, 12)), *[list(range(8, 12))] * 3],
        *[list(range(8, 16)), *[list(range(12, 16))] * 3],
    ]
    assert output.stats.merged_stores == 3 and output.stats.passes == 9
    delayed = dkv.generate(model, ids, max_new_tokens=9, cache=dkv.DecodeCache(None, warmup=1), output_active=True)
    assert [int(active.sum()) for active in delayed.active[:, 0]] == [8, 8, 4, 3, 2, 8, 4, 3, 2]


def test_what_ends_the_last_block_is_not_counted():
    model = small_model(attention="block", block_length=4)
    ids, mask = pad_rows(PROMPTS)
    output = dkv.generate(model, ids, mask, max_new_tokens=[11, 14, 6], eos_token_id=[])
    assert output.stats.new_tokens == 11 + 14 + 6


def test_delayed_decoding_inside_a_block_computes_less():
    """One token a pass in blocks of 32: at most 60 % of the slots of block-only passes."""
    model = small_model(attention="block", block_length=32)
    ids = torch.randint(0, 60, (1, 32), generator=torch.Generator().manual_seed(0))
    plain = dkv.generate(model, ids, max_new_tokens=64, eos_token_id=[])
    delayed = dkv.generate(model, ids, max_new_tokens=64, cache=dkv.DecodeCache(None), eos_token_id=[])
    assert delayed.stats.computed_slots <= 0.6 * plain.stats.computed_slots


def test_the_next_turn_computes_only_what_is_new(model):
    ids, mask = pad_rows(PROMPTS[:2])
    first = dkv.generate(model, ids, mask, max_new_tokens=13, eos_token_id=[])
    more = torch.tensor([[20, 21, 22], [23, 24, 25]])
    prompts, real = torch.cat((first.sequences, more), 1), torch.cat((mask, torch.ones(2, 16, dtype=mask.dtype)), 1)
    call = {"max_new_tokens": 6, "eos_token_id": []}
    fresh, output = (dkv.generate(model, prompts, real, **call, **how) for how in ({}, {"kv_cache": first.kv_cache}))
    assert torch.equal(output.sequences, fresh.sequences)
    assert output.stats.computed_slots == fresh.stats.computed_slots - output.stats.reused_slots
    counted_anew = model.spec.blocks_from_prompt and model.spec.attention == "block"
    # With blocks that are counted from the end of the prompt, those of another prompt are others.
    assert output.stats.reused_slots >= (0 if counted_anew else 2 * 8)


def test_infill(model):
    text = torch.tensor([[5, 9, MASK, 8, 1, MASK, MASK, 2, 3, 4, 9], [MASK, 2, 3, 4, 5, 6, 7, 8, 9, 10, MASK]])
    output = dkv.infill(model, text)
    known = text != MASK
    assert torch.equal(output.sequences[known], text[known]) and not (output.sequences == MASK).any()
    for row in range(2):
        assert torch.equal(dkv.infill(model, text[row : row + 1]).sequences[0], output.sequences[row])


def test_nothing_to_fill(model):
    text = torch.tensor(PROMPTS[:1])
    for output in (dkv.infill(model, text), dkv.generate(model, text, max_new_tokens=0)):
        assert torch.equal(output.sequences, text) and output.stats.passes == output.stats.new_tokens == 0


def test_a_stream_ends_in_the_output(model):
    ids = torch.tensor([PROMPTS[0]])
    drafts = list(dkv.stream(model, ids, max_new_tokens=9))
    assert torch.equal(drafts[-1].sequences, dkv.generate(model, ids, max_new_tokens=9).sequences)
    assert all(draft.sequences.shape == (1, 16) for draft in drafts)


def test_rows_end_at_the_end_token_of_the_model():
    """As published, without being asked to; behind the end stands padding."""
    model = small_model(attention="block", block_length=4)
    ids = torch.tensor([PROMPTS[0]])
    free = dkv.generate(model, ids, max_new_tokens=20, eos_token_id=62)
    end = int(free.sequences[0, 12])
    model.spec = replace(model.spec, eos_token_id=end, pad_token_id=0)
    output = dkv.generate(model, ids, max_new_tokens=20)
    found = (output.sequences[0, 7:] == end).nonzero()[0, 0]
    assert not output.sequences[0, 7 + found + 1 :].any() and output.stats.passes < free.stats.passes


REFUSED = {
    "cache 'greedy' does not go with a block-causal model": {"cache": "greedy"},
    "cache 'rollout' does not go.*never change": {"cache": "rollout"},
    "cache 'elastic' does not go.*never does": {"cache": "elastic"},
    "block_length=3 must divide": {"block_length": 3},
    "cfg_scale=1.0 does not go": {"cfg_scale": 1.0},
    "schedule='time' does not go": {"schedule": "time"},
    "edit_threshold.*whole blocks": {"edit_threshold": 0.5, "block_length": 2},
    "edit_threshold.*cache": {"edit_threshold": 0.5, "cache": "decode"},
    "edit_threshold.*confidence": {"edit_threshold": 0.5, "confidence": "random"},
    'schedule="speculative" needs a model': {"schedule": "speculative"},
    "steps.*2 blocks": {"steps": 1},
}


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if not policy.in_blocks])
def test_a_policy_that_has_nothing_to_do_is_refused_with_what_has(name):
    model = small_model(attention="block", block_length=4)
    slides = {"schedule": "sliding", "block_length": 4} if name == "sliding" else {}
    instead = "schedule" if slides else 'use "(none|decode|dual)"'
    with pytest.raises(ValueError, match=instead):
        dkv.generate(model, torch.tensor([PROMPTS[0]]), max_new_tokens=5, cache=name, **slides)


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_go_with_blocks(message):
    model = small_model(attention="block", block_length=4)
    with pytest.raises(ValueError, match=message):
        dkv.generate(model, torch.tensor([PROMPTS[0]]), max_new_tokens=5, **REFUSED[message])


def test_edits_need_a_model_with_blocks(llada):
    with pytest.raises(ValueError, match="edit_threshold"):
        dkv.generate(llada, torch.tensor([PROMPTS[0]]), max_new_tokens=5, edit_threshold=0.5)
    model = small_model(attention="block", block_length=4)
    with pytest.raises(ValueError, match=r"edit_threshold.*infill"):
        dkv.infill(model, torch.tensor([[5, MASK, 3]]), edit_threshold=0.5)


def test_gaps_of_unknown_length_need_a_model_whose_slots_see_all():
    model = small_model(attention="block", block_length=4)
    assert len(dkv.fill_gaps(model, [[5, dkv.Gap(2, 2), 9]]).fillings[0][0]) == 2
    with pytest.raises(ValueError, match="does not see what stands behind a block"):
        dkv.fill_gaps(model, [[5, dkv.Gap(0, 2), 9]])


def test_a_model_that_does_not_say_its_blocks_is_asked():
    model = small_model(attention="block")
    with pytest.raises(ValueError, match="block_length is needed"):
        dkv.generate(model, torch.tensor([PROMPTS[0]]), max_new_tokens=5)
    assert dkv.generate(model, torch.tensor([PROMPTS[0]]), max_new_tokens=5, block_length=4).stats.passes == 5 + 0
