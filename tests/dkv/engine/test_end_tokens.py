"""End tokens that win too early: never emitted, or filled last. After LLaDA's `logits_eos_inf` and its sibling."""

import itertools
from dataclasses import replace

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper

import dkv
from dkv import kernels
from dkv.integrations.lm_eval.settings import stated
from dkv.kernels.common.backend import interpreted
from dkv.tools.text import turn_end_ids
from tests.dkv.conftest import EOS, MASK, pad_rows

EOT, POLICIES = 61, ("none", "decode", "greedy", "prefill", "pd", "prefix", "dual", "suffix", "rollout", "elastic")
RULES = ("probability", "margin", "entropy")
IDS = torch.tensor([[1, 2, 3]])


def ends_first(call, positions):
    """The end token is best everywhere, its confidence falls to the left; the next best id is the position."""
    logits = torch.zeros(*positions.shape, 64)
    slot = positions.unsqueeze(-1)
    logits[..., EOS] = 20.0 + positions
    return logits.scatter(-1, slot % 40, (8.0 + slot / 4.0))


def mixed_ends(call, positions):
    """Every other slot prefers an end token, EOS or EOT in turn, and is surer of it than the others of theirs."""
    logits = torch.zeros(*positions.shape, 64).scatter(-1, positions.unsqueeze(-1) % 40, 6.0)
    for token, rest in ((EOS, 1), (EOT, 3)):
        logits[..., token] = torch.where(positions % 4 == rest, 15.0, 1.0)
    return logits


@pytest.fixture
def ending(stub):
    """A stub whose spec names its end tokens; nothing ends at them, as `eos_token_id` is not given."""

    def make(script, **sizes):
        model = stub(script, **sizes)
        model.spec = replace(model.spec, eos_token_id=EOS, eot_token_id=EOT)
        return model

    return make


def test_R10_ends_are_never_emitted(ending):
    plain = dkv.generate(ending(ends_first), IDS, max_new_tokens=8)
    assert plain.sequences[0, 3:].tolist() == [EOS] * 8
    for cache, rule, steps in itertools.product(POLICIES, (*RULES, "random"), (8, 3)):
        if cache in ("rollout", "elastic") and rule == "random":
            continue  # it needs a confidence to go by
        output = dkv.generate(
            ending(ends_first), IDS, max_new_tokens=8, steps=steps, cache=cache, confidence=rule, block_length=4,
            logits_eos_inf=True, seed=1,
        )  # fmt: skip
        assert output.sequences[0, 3:].tolist() == list(range(3, 11)), (cache, rule)


@pytest.mark.parametrize("cache", POLICIES)
@pytest.mark.parametrize(
    "how",
    [{}, {"threshold": 0.0}, {"factor": 1e6}, {"entropy_bound": 1e6}, {"alg_temp": 1e6}, {"steps": 5}],
    ids=str,
)
def test_R10_ends_are_filled_last_and_stay_what_they_are(ending, cache, how):
    for rule in RULES:
        if rule == "entropy" and "factor" in how:
            continue
        dynamic = {"threshold": -1e6} if rule == "entropy" and "threshold" in how else how
        call = {"max_new_tokens": 8, "cache": cache, "confidence": rule, "seed": 3, "output_history": True, **dynamic}
        plain = dkv.generate(ending(mixed_ends), IDS, **call)
        held = dkv.generate(ending(mixed_ends), IDS, **call, confidence_eos_eot_inf=True)
        final = held.sequences[0, 3:]
        # Slots 3, 5, 7 and 9 prefer an end.
        assert final.tolist() == plain.sequences[0, 3:].tolist() == [EOT, 4, EOS, 6, EOT, 8, EOS, 10]
        is_end = torch.isin(final, torch.tensor([EOS, EOT]))
        for canvas in held.history[:, 0, 3:]:
            filled = canvas != MASK
            assert filled[~is_end].all() or not filled[is_end].any(), (rule, held.history[:, 0, 3:])
        if not how:
            assert (plain.history[0, 0, 3:] != MASK)[is_end].any()


def test_R10_only_ends_end_a_generation_in_the_published_order(stub):
    """Where every slot prefers the end, they are filled all the same, one a step."""
    for cache, how in itertools.product(POLICIES, ({}, {"threshold": 0.9}, {"factor": 50.0}, {"entropy_bound": 50.0})):
        output = dkv.generate(
            stub(ends_first), IDS, max_new_tokens=8, cache=cache, eos_token_id=EOS, pad_token_id=0,
            confidence_eos_eot_inf=True, output_history=True, **how,
        )  # fmt: skip
        # The row ends with the first of them, at the left.
        assert output.sequences[0, 3:].tolist() == [EOS] + [0] * 7 and len(output.history) == 1


def published(model, ids, new, never, late):
    """LLaDA's loop at temperature 0, one token a step: the token first, then the softmax without end tokens."""
    canvas = torch.cat((ids, torch.full((1, new), MASK)), 1)
    for _ in range(new):
        logits = model(canvas)[0].double()
        logits[:, never] = -torch.inf
        token = logits.index_fill(-1, torch.tensor([MASK]), -torch.inf).argmax(-1)
        logits[:, late] = -torch.inf
        confidence = logits.softmax(-1).gather(1, token[:, None])[:, 0]
        slot = confidence.masked_fill(canvas[0] != MASK, -1).argmax()
        canvas[0, slot] = token[slot]
    return canvas


def test_tokens_are_those_of_the_published_loop(build):
    """With end tokens that have much of the probability at slots that prefer another token."""
    found = 0
    model = build()
    for eos, eot in zip(range(0, 60, 5), range(58, 0, -5), strict=True):
        model.spec = replace(model.spec, eos_token_id=eos, eot_token_id=eot)
        plain = dkv.generate(model, IDS, max_new_tokens=10).sequences
        for never, late in (((eos,), ()), ((), (eos, eot)), ((eos,), (eos, eot))):
            output = dkv.generate(
                model, IDS, max_new_tokens=10, logits_eos_inf=bool(never), confidence_eos_eot_inf=bool(late)
            )
            assert torch.equal(output.sequences, published(model, IDS, 10, list(never), list(late))), (eos, eot, never)
            found += not torch.equal(plain, output.sequences)
    assert found > 5


@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("drawn", [{}, {"temperature": 0.8, "top_k": 12, "top_p": 0.9}], ids=str)
def test_confidences_are_those_without_end_tokens(model, backend, rule, drawn):
    """Against the definition, from the raw logits of the same pass."""
    if backend == "triton" and not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    if backend == "triton" and not model.spec.shifted:
        pytest.skip("one family is enough for the interpreter")
    never, call = [5, 21], {"max_new_tokens": 12, "confidence": rule, "seed": 5, "schedule": "blocks"} | drawn
    chosen = dkv.generate(model, IDS, **call, steps=1, eos_token_id=never, logits_eos_inf=True).sequences[0, 3:]
    late = chosen[::2].unique().tolist()
    call, ends = {**call, "steps": 4}, {"eos_token_id": never, "eot_token_id": late}
    with kernels.use_backend(backend):
        output = dkv.generate(
            model, IDS, **call, **ends, logits_eos_inf=True, confidence_eos_eot_inf=True, output_logits=True,
            output_confidences=True, output_history=True,
        )  # fmt: skip
    assert not torch.isin(output.sequences[0, 3:], torch.tensor(never)).any()
    shift = int(model.spec.shifted)
    logits = output.logits[0][0, 3 - shift : 15 - shift].double()
    logits[:, never] = -torch.inf
    if drawn:
        held = torch.isin(chosen, torch.tensor(late))
        assert torch.equal(output.confidences[0, 0, 3:] == -torch.inf, held)
        return
    token = logits.index_fill(-1, torch.tensor([MASK]), -torch.inf).argmax(-1)
    held = torch.isin(token, torch.tensor(late))
    logits[:, late] = -torch.inf
    share = logits.log_softmax(-1)
    best = logits.index_fill(-1, torch.tensor([MASK]), -torch.inf).topk(2).indices
    expected = {
        "probability": share.gather(1, token[:, None])[:, 0],
        "margin": (share.exp().gather(1, best[:, :1]) - share.exp().gather(1, best[:, 1:]))[:, 0].log(),
        "entropy": -torch.special.entr(share.exp()).sum(-1),
    }[rule].masked_fill(held, -torch.inf)
    torch.testing.assert_close(output.confidences[0, 0, 3:].double(), expected, atol=1e-4, rtol=1e-4)
    assert held.any() and not held.all()


def test_every_way_to_the_logits_agrees(llada, build, monkeypatch):
    """A plain head, one in strips (packed), one behind a logits processor, guidance, and a bias."""
    from dkv.models.packing import can_pack, pack_

    # Strips of 8 ids: end tokens in the first, in the second, and at the border of it.
    monkeypatch.setattr("dkv.kernels.choose.torch.STRIP", 8)
    same = LogitsProcessorList([TemperatureLogitsWarper(1.0)])
    call = {"max_new_tokens": 12, "eos_token_id": [7, 8, 11], "eot_token_id": 5, "pad_token_id": 0}
    for flags in ({"logits_eos_inf": True}, {"confidence_eos_eot_inf": True}):
        expected = dkv.generate(llada, IDS, **call, **flags)
        processed = dkv.generate(llada, IDS, **call, **flags, logits_processor=same)
        outputs = [processed, dkv.generate(llada, IDS, **call, **flags, output_logits=True)]
        if can_pack():
            outputs.append(dkv.generate(pack_(build()), IDS, **call, **flags))
        for output in outputs:
            assert torch.equal(output.sequences, expected.sequences), flags
        guided = dkv.generate(llada, IDS, **call, **flags, cfg_scale=1.0)
        assert "logits_eos_inf" not in flags or not torch.isin(guided.sequences[:, 3:], torch.tensor([7, 8, 11])).any()


def test_rows_are_what_they_are_alone(model):
    rows = [[5, 9], [7, 3, 20, 41, 2], [1]]
    ids, mask = pad_rows(rows)
    call = {"max_new_tokens": 9, "cache": "decode", "eot_token_id": [7, 9, 11, 13, 21], "confidence_eos_eot_inf": True}
    output = dkv.generate(model, ids, mask, **call, logits_eos_inf=True, seed=2)
    for row, given in enumerate(rows):
        alone = dkv.generate(model, torch.tensor([given]), **call, logits_eos_inf=True, seed=2)
        assert torch.equal(output.sequences[row, 5:], alone.sequences[0, len(given) :])


def test_infill_knows_the_ends_and_ends_nowhere(stub):
    text = torch.tensor([[1, MASK, 2, MASK, MASK, 3]])
    found = dkv.infill(stub(ends_first), text, eos_token_id=EOS)
    assert found.sequences.tolist() == [[1, EOS, 2, EOS, EOS, 3]]
    found = dkv.infill(stub(ends_first), text, eos_token_id=EOS, logits_eos_inf=True)
    assert found.sequences.tolist() == [[1, 1, 2, 3, 4, 3]]
    found = dkv.infill(
        stub(mixed_ends), text, eos_token_id=EOS, eot_token_id=EOT, confidence_eos_eot_inf=True, output_history=True
    )
    assert found.sequences.tolist() == [[1, EOS, 2, EOT, 4, 3]] and found.history[0, 0, 4] == 4


def test_ends_come_from_the_model_where_they_are_not_given(build):
    model = build(eos_token_id=7, eot_token_id=9)
    given = dkv.generate(model, IDS, max_new_tokens=8, eos_token_id=7, eot_token_id=9, confidence_eos_eot_inf=True,
                         stopping_criteria=None, pad_token_id=7, output_confidences=True)  # fmt: skip
    own = dkv.generate(model, IDS, max_new_tokens=8, confidence_eos_eot_inf=True, output_confidences=True)
    assert torch.equal(given.confidences[0].nan_to_num(7), own.confidences[0].nan_to_num(7))
    nameless = build(eos_token_id=None)
    for name in ("logits_eos_inf", "confidence_eos_eot_inf"):
        with pytest.raises(ValueError, match=f"{name} needs an end token, and the model names none: give eos_token_id"):
            dkv.generate(nameless, IDS, **{name: True})
    with pytest.raises(ValueError, match="confidence_eos_eot_inf needs a confidence to go by"):
        dkv.generate(model, IDS, confidence="random", confidence_eos_eot_inf=True)
    with pytest.raises(ValueError, match="eot_token_id must be at most 63"):
        dkv.generate(model, IDS, eot_token_id=[3, 64])


def test_turn_ends_are_found_in_a_tokenizer():
    class Tokenizer:
        def __init__(self, **vocabulary):
            self.get_vocab = lambda: vocabulary

    assert turn_end_ids(Tokenizer(**{"a": 1, "<|eot_id|>": 3})) == [3]
    assert turn_end_ids(Tokenizer(**{"<|im_end|>": 9, "b": 4})) == [9]
    assert turn_end_ids(Tokenizer(a=1)) is None


def test_model_args_of_lm_eval_take_them():
    assert stated({"logits_eos_inf": True, "eot_token_id": [4, 5]}) == {"logits_eos_inf": True, "eot_token_id": [4, 5]}
