"""Slots that stop inside the network: the rule once more, slot by slot, and what goes with it."""

import random
from dataclasses import asdict
from functools import partial

import pytest
import torch

import dkv
from dkv.core.schedule import block_schedule
from dkv.core.sequences import Sequences
from dkv.engine.config import DiffusionConfig
from dkv.engine.engine import Engine
from dkv.engine.noise import Noise
from dkv.engine.records import entering
from dkv.kernels import rotate
from dkv.policies.base import Cut

MASK = 63
IDS = torch.tensor([[5, 9, 3, 8], [7, 2, 40, 11]])


class Reference:
    """The rule of ES-dLLM for one row, on dense buffers that are indexed by slot."""

    def __init__(self, model, policy, text, block_length, threshold=None):
        self.model, self.policy, self.threshold = model, policy, threshold
        self.text, self.first = text.clone(), int(model.spec.shifted)
        fill = [slot for slot, token in enumerate(text.tolist()) if token == MASK]
        self.blocks = [fill[i : i + block_length] for i in range(0, len(fill), block_length)]
        self.plan = block_schedule(len(fill), len(fill), block_length)
        self.fill, size = fill, len(text)
        self.cuts = {cut.layer: cut.share for cut in policy.cuts(len(model.layers))}
        self.kept = {layer: torch.zeros(size, model.spec.hidden_size) for layer in self.cuts}
        self.confidence, self.filled, self.buffers = {}, [], {}
        self.steps = []

    def by(self, slot):
        """The slot that predicts this one."""
        return max(slot - self.first, 0)

    def run(self):
        clock = 0
        for place, block in enumerate(self.blocks):
            number, left = 0, [step.left for step in self.plan if step.block == place]
            while masks := [slot for slot in block if self.text[slot] == MASK]:
                self.take(block, masks, number, clock, max(len(masks) - left[number], self.threshold is not None))
                number, clock = number + 1, clock + 1
            clock += len(block) - number
        return self.steps

    def range(self, block, number, prompt):
        own = [slot for slot in self.fill if slot <= block[-1] and slot >= (block[0] if number else min(self.filled))]
        own = range(block[-1] + 1) if prompt else own
        if not self.first:
            return list(own)
        return sorted({self.by(slot) for slot in own} | {slot for slot in own if slot != block[-1]})

    def take(self, block, masks, number, clock, count):
        prompt, everything = (bool(n) and clock % n == 0 for n in (self.policy.prompt_every, self.policy.block_every))
        left = list(range(len(self.text))) if clock == 0 else self.range(block, number, prompt)
        whole, entered, sets = clock == 0 or prompt or everything, len(left), []
        x, delta = self.model.embed(self.text[left]), None
        for layer in self.model.layers:
            sets.append(left)
            x, delta = layer(x, delta, lambda *given, at=left: self.attend(*given, at))
            if layer.index in self.cuts:
                x, delta = x if delta is None else x + delta, None
                if not whole:
                    least = max(min(len(self.filled) + 2, len(block)), count)
                    want = max(int(self.cuts[layer.index] * entered), least)
                    going = self.going(layer.index, left, x, masks, max(count, 1))[:want]
                    going = [i for i in range(len(left)) if i in going]
                    left, x = [left[i] for i in going], x[going]
                self.kept[layer.index][left] = x
        sets.append(left)
        logits = self.model.head(self.model.norm.added(x, delta)[0])
        best = logits.softmax(-1)[:, :MASK].max(-1)
        found = {slot: left.index(self.by(slot)) for slot in masks if self.by(slot) in left}
        self.confidence |= {slot: best.values[i].item() for slot, i in found.items()}
        order = sorted(found, key=lambda slot: (-best.values[found[slot]].item(), slot))
        sure = sum(self.confidence[slot] >= self.threshold for slot in order) if self.threshold else 0
        self.filled = order[: max(sure, count)]
        for slot in self.filled:
            self.text[slot] = best.indices[found[slot]]
        self.steps.append((self.text.clone(), sets))

    def going(self, layer, left, x, masks, count):
        """The places of the entries that are left, best first."""
        alpha, old = self.policy.alpha, self.kept[layer][left]
        change = (x - old).abs().mean(-1) / (old.square().mean(-1).sqrt() + 1e-6)
        change = (change / change.max().clamp(min=1)).tolist()
        sure = [max([self.confidence.get(m, 0.0) for m in masks if self.by(m) == slot], default=0.0) for slot in left]
        score = [alpha * c + (1 - alpha) * d for c, d in zip(sure, change, strict=True)]
        if alpha > 0:
            for i in sorted(range(len(left)), key=lambda i: (-sure[i], i))[:2]:
                score[i] += 2
        filled, next_ = ({self.by(slot) for slot in of} for of in (self.filled, masks[:count]))
        for i, slot in enumerate(left):
            score[i] += (3 if alpha < 1 and slot in filled else 0) + (100 if slot in next_ else 0)
        return sorted(range(len(left)), key=lambda i: (-score[i], i))

    def attend(self, layer, query, key, value, at):
        cos, sin = (table[torch.tensor(at)] for table in self.model.rope_tables(len(self.text)))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        group = query.shape[1] // key.shape[1]
        if layer.index not in self.buffers:
            self.buffers[layer.index] = torch.zeros(2, len(self.text), *key.shape[1:])
        keys, values = self.buffers[layer.index]
        keys[at], values[at] = key, value
        keys, values = (y.repeat_interleave(group, 1).transpose(0, 1) for y in (keys, values))
        weight = (query.transpose(0, 1) @ keys.transpose(1, 2) * layer.head_dim**-0.5).softmax(-1)
        return (weight @ values).transpose(0, 1)


@torch.no_grad()
def steps_of(model, text, **settings):
    """What a row looks like after every step, and the slots that enter each layer in it, by dkv."""
    found, fill = [], text[None] == MASK
    rows = Sequences(text[None], torch.ones_like(fill), fill, MASK)
    config = DiffusionConfig(max_new_tokens=int(fill.sum()), schedule="blocks", **settings)

    def watch(engine, result):
        masks = entering(engine, result)[:, 0]
        found.append((engine.sequences[0].clone(), [mask.nonzero().flatten().tolist() for mask in masks]))

    engine = Engine(model, rows, config, Noise([0], rows), MASK, hooks=[watch])
    while engine.numbers:
        engine.step()
    return found


def case(seed):
    """A policy, a text with masks in it, a length of blocks, and a threshold or none."""
    draw = random.Random(seed)
    shares = draw.choice(["1/2@1/8+1/4@1/4", "1/2@0.65", "0.5@0.3+0.2@0.8", "0.3@0"])
    # Between gaps a pass may change nothing but for rounding: there confidences alone decide.
    alpha = 1 if seed % 2 else draw.choice([0, 0.5, 1])
    policy = dkv.SkipCache(shares, alpha, draw.choice([0, 3, 8]), draw.choice([None, 5, 64]))
    new = draw.randint(8, 24)
    text = [draw.randrange(62) for _ in range(draw.randint(1, 9))] + [MASK] * new
    if seed % 2:
        text = [draw.randrange(62) if draw.random() < 0.4 else MASK for _ in range(30)] + [5]
    return policy, torch.tensor(text), draw.choice([4, 8, 10]), draw.choice([None, None, 0.1, 0.3])


@pytest.fixture(scope="module")
def deep(request):
    from tests.dkv.conftest import small_model

    dream = {"family": "dream", "num_kv_heads": 2, "shifted": True, "qkv_bias": True, "rope_float32": False}
    return {"llada": small_model(num_layers=4), "dream": small_model(num_layers=4, **dream)}


@pytest.mark.parametrize("seed", [pytest.param(i, marks=pytest.mark.slow if i > 3 else ()) for i in range(30)])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_every_step_is_that_of_the_rule(deep, family, seed):
    policy, text, length, threshold = case(seed)
    with torch.no_grad():
        expected = Reference(deep[family], policy, text, length, threshold).run()
    found = steps_of(deep[family], text, cache=policy, block_length=length, threshold=threshold)
    assert len(found) == len(expected)
    for step, ((tokens, sets), (own, own_sets)) in enumerate(zip(found, expected, strict=True)):
        assert sets == own_sets, step
        assert torch.equal(tokens, own), step


def test_work_is_counted_layer_for_layer(deep):
    call = {"cache": dkv.SkipCache(block_every=4), "block_length": 8}
    sets = [row for _, row in steps_of(deep["llada"], torch.cat((IDS[0], torch.full((16,), MASK))), **call)]
    stats = dkv.generate(deep["llada"], IDS[:1], max_new_tokens=16, **call).stats
    computed = sum(len(slots) for row in sets for slots in row[:-1])
    assert stats.computed_slots == sum(len(row[0]) for row in sets) and stats.total_slots == 16 * 20
    assert stats.computed_share == pytest.approx(computed / (4 * 16 * 20)) and stats.full_passes == 1
    assert 0 < stats.skipped_slots < stats.computed_slots
    # One block: how many slots enter a pass does not depend on which were filled.
    stats, twice = (
        dkv.generate(deep["llada"], IDS[:1], max_new_tokens=16, cfg_scale=scale, cache=call["cache"]).stats
        for scale in (0, 0.5)
    )
    assert twice.computed_slots == 2 * stats.computed_slots and twice.skipped_slots == 2 * stats.skipped_slots


@pytest.mark.parametrize("steps", [3, 5])
def test_every_mask_is_filled_where_a_step_fills_many(deep, steps):
    """Fewer slots than the step fills may go on by their share: then as many of the leftmost masks do."""
    for model in deep.values():
        call = {"block_length": 12, "steps": steps, "cache": dkv.SkipCache("1/8@0", block_every=0, prompt_every=0)}
        output = dkv.generate(model, IDS, max_new_tokens=12, output_history=True, **call)
        left = (output.history == MASK).sum(2)[:, 0].tolist()
        assert left == [
            step.left for step in DiffusionConfig(max_new_tokens=12, steps=steps, block_length=12).plan(False)
        ]


def test_what_looks_into_a_step_sees_what_is_left(deep):
    """A processor, logits and confidences: of the slots that went through all layers; and the tokens stay the same."""
    seen, call = [], {"max_new_tokens": 12, "block_length": 6, "cache": dkv.SkipCache(block_every=3), "seed": 1}
    for model in deep.values():
        plain = dkv.generate(model, IDS, **call)

        def look(ids, scores):
            seen.append(len(scores))
            return scores

        output = dkv.generate(model, IDS, **call, logits_processor=look, output_logits=True, output_confidences=True)
        assert torch.equal(output.sequences, plain.sequences)
        assert torch.equal(list(dkv.stream(model, IDS, **call))[-1].sequences, plain.sequences)
        through = torch.stack([step.abs().sum(-1) > 0 for step in output.logits])
        ranked = ~output.confidences.isnan()
        if model.spec.shifted:
            ranked = ranked.roll(-1, 2)
        assert not (ranked & ~through).any() and sum(seen) == ranked.sum()
        seen.clear()


def test_the_reference_backend_gives_the_same_tokens(model, padded):
    """At first a pass has more slots to score than can be scored after its cuts."""
    ids, mask = padded([[5, 9, 3, 8], [7]])
    call = {"max_new_tokens": [9, 6], "block_length": 6, "cache": dkv.SkipCache("1/4@0", block_every=4)}
    expected = dkv.generate(model, ids, mask, **call).sequences
    with dkv.use_backend("reference"):
        assert torch.equal(dkv.generate(model, ids, mask, **call).sequences, expected)


def test_shares_in_any_form_are_one_policy():
    pairs = [[1, 0], [0.5, 0.125], [0.25, 0.25]]
    policy = dkv.SkipCache(shares=pairs)
    assert policy == dkv.SkipCache(shares=torch.tensor(pairs)) and policy.cuts(32) == dkv.SkipCache().cuts(32)
    assert dkv.SkipCache().cuts(32) == [Cut(4, 0.5), Cut(8, 0.25)] and dkv.SkipCache().cuts(2) == [Cut(1, 0.25)]
    assert dkv.SkipCache("").cuts(8) == [] and dkv.SkipCache("0.5@0").cuts(8) == [Cut(0, 0.5)]
    config = DiffusionConfig(cache=policy)
    assert DiffusionConfig.from_dict(config.to_dict()).cache == policy
    assert DiffusionConfig(cache={"name": "skip", **asdict(policy)}).cache == policy


@pytest.mark.parametrize(
    "given, message",
    [
        ({"shares": "half"}, "shares must be text such as"),
        ({"shares": "1/0@0"}, "shares must be text such as"),
        ({"shares": 0.5}, "shares must be text such as"),
        ({"shares": [[0.5]]}, "shares must be text such as"),
        ({"shares": "3/2@0"}, "above 0 and at most 1"),
        ({"shares": "0@1/2"}, "above 0 and at most 1"),
        ({"shares": "1/2@2"}, "depths from 0 to 1"),
        ({"shares": "1/4@1/4+1/2@1/2"}, "shares must fall"),
        ({"shares": "1/2@1/2+1/4@1/4"}, "depths rise"),
        ({"alpha": 1.5}, "alpha must be between 0 and 1"),
        ({"alpha": True}, "alpha must be between 0 and 1"),
        ({"alpha": "much"}, "alpha must be between 0 and 1"),
        ({"block_every": -1}, "block_every must be a whole number"),
        ({"prompt_every": 1.5}, "prompt_every must be a whole number"),
    ],
    ids=str,
)
def test_what_a_policy_may_not_be(given, message):
    with pytest.raises(ValueError, match=message):
        dkv.SkipCache(**given)


def test_what_it_does_not_go_with():
    with pytest.raises(ValueError, match="cache='skip' needs a confidence"):
        DiffusionConfig(cache="skip", confidence="random")
    with pytest.raises(
        ValueError, match=r'cache SkipCache\(.* goes by blocks, which do not slide: give schedule="blocks"'
    ):
        DiffusionConfig(cache="skip", schedule="sliding", block_length=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_changes_within_rounding_are_none(dtype):
    """What slots go on does not follow from the last bits of states that have not changed."""
    noise = torch.rand(3, 7, dtype=dtype) * 30 * torch.finfo(dtype).eps
    confidence, bonus = torch.rand(3, 7, dtype=dtype), torch.zeros(3, 7, dtype=dtype)
    outside = torch.zeros(3, 7, dtype=torch.bool)
    score = partial(dkv.SkipCache().score, confidence, bonus=bonus, outside=outside)
    assert torch.equal(score(noise), score(torch.zeros_like(noise)))
    real = noise + 1e-3
    assert (score(real) > score(noise)).all()
    assert score(noise.fill_(torch.nan)).isnan().all()
