"""Confidences that a generation keeps: those of its logits, at the slots that it ranked."""

import pytest
import torch

import dkv

CACHES = [dkv.NoCache(), dkv.DecodeCache(3), dkv.PrefillCache(), dkv.PrefillDecodeCache(3), dkv.GreedyCache(3, 2)]
RULES = ["probability", "margin", "entropy", "random"]
OUTCOMES = {
    "probability": lambda p: p.max().log(),
    "margin": lambda p: p.topk(2).values.diff().neg().squeeze().log(),
    "entropy": lambda p: (p * p.log()).sum(),
    "random": lambda p: p.max().log(),
}


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_confidences_are_those_of_the_logits_of_each_step(model, padded, cache, rule):
    """No id is the mask by chance here, so that the best id is also the best that may be chosen."""
    ids, padding = padded([[5, 9], [7, 3, 20, 41, 2]])
    call = {"max_new_tokens": 6, "block_length": 3, "cache": cache, "confidence": rule, "seed": 0}
    kept = {f"output_{name}": True for name in ("history", "active", "confidences", "logits")}
    output = dkv.generate(model, ids, padding, **call, **kept)
    assert output.confidences.shape == output.history.shape and output.confidences.dtype == torch.float32
    before = torch.cat((ids, torch.full((2, 6), 63)), 1)
    for step, canvas in enumerate(output.history):
        ranked, decoded = ~output.confidences[step].isnan(), canvas != before
        assert (decoded & ~ranked).sum() == 0 and (ranked & (before != 63)).sum() == 0
        assert not ranked[:, 8 if step < 3 else 11 :].any()
        for row, slot in ranked.nonzero().tolist():
            source = slot - int(model.spec.shifted)
            assert output.active[step, row, source]
            p = output.logits[step][row, source].double().softmax(0)
            assert p.argmax() != 63 and (not decoded[row, slot] or canvas[row, slot] == p.argmax())
            assert abs(output.confidences[step, row, slot] - OUTCOMES[rule](p)) < 1e-4
        before = canvas


def test_confidences_cover_the_masks_of_the_block_or_what_is_decoded_by_chance(llada):
    ids = torch.tensor([[5, 9, 3]])
    call = {"max_new_tokens": 8, "block_length": 4, "cache": dkv.DecodeCache(3), "seed": 0, "output_confidences": True}
    ranked = [dkv.generate(llada, ids, **call, confidence=rule).confidences.isfinite() for rule in RULES]
    assert [kind.sum((1, 2)).tolist() for kind in ranked] == [[4, 3, 2, 1, 4, 3, 2, 1]] * 3 + [[1] * 8]
    assert all(kind[:4, 0, 3:7].any() and not kind[:4, 0, 7:].any() and not kind[..., :3].any() for kind in ranked)


def test_confidences_are_not_kept_unless_asked_for_and_change_no_token(model):
    ids = torch.tensor([[5, 9, 3]])
    call = {"max_new_tokens": 6, "cache": dkv.GreedyCache(3, 2)}
    plain, kept = dkv.generate(model, ids, **call), dkv.generate(model, ids, **call, output_confidences=True)
    assert plain.confidences is None and torch.equal(plain.sequences, kept.sequences)
