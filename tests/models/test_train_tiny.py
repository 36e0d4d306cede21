"""The training script: what a batch and its loss are, and that a stopped training goes on alike."""

import json
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

import dkv
from dkv.models.bundled import train as train_tiny
from dkv.models.bundled.tasks import TASKS
from dkv.models.bundled.train import EOS, MASK, SPECS, batch_of, encode, loss_of


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_is_prompts_answers_and_ends(task):
    widths = set()
    for seed in range(20):
        ids, prompt = batch_of(task, random.Random(seed), 2)
        rng = random.Random(seed)
        for row in ids.tolist():
            text = encode("".join(TASKS[task].problem(rng)))
            assert row[: len(text)] == text and set(row[len(text) :]) == {EOS}
        widths.add(ids.shape[1] - prompt)
    assert TASKS[task].new_tokens in widths and len(widths) > 4


class Oracle(nn.Module):
    """Gives the token of every slot the logit 20, or that of the next slot in a shifted model."""

    def __init__(self, spec, ids):
        super().__init__()
        self.spec, self.ids, self.seen = spec, ids, None

    def forward(self, x):
        self.seen = x
        target = self.ids.roll(-1, 1) if self.spec.shifted else self.ids
        return 20.0 * torch.nn.functional.one_hot(target, self.spec.vocab_size)


@pytest.mark.parametrize("name", SPECS)
def test_the_loss_is_that_of_masked_answer_slots(name):
    ids, prompt = batch_of("balance", random.Random(0), 16)
    oracle = Oracle(SPECS[name], ids)
    torch.manual_seed(0)
    loss, hit = loss_of(oracle, ids, prompt)
    assert loss < 1e-5 and hit == 1
    masked = oracle.seen == MASK
    assert not masked[:, :prompt].any() and torch.equal(oracle.seen[~masked], ids[~masked])
    # t is spread evenly over the rows.
    assert masked[:, prompt:].float().mean(1).sort().values.diff().abs().max() < 0.3
    torch.manual_seed(0)
    oracle.ids = ids.roll(1, 0)
    assert loss_of(oracle, ids, prompt)[0] > 1


def test_a_stopped_training_goes_on_alike(tmp_path, monkeypatch, one_thread):
    small = replace(SPECS["tiny-dream"], hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16)
    monkeypatch.setitem(SPECS, "tiny-dream", small)
    monkeypatch.setattr(train_tiny, "SAVE", 2)
    monkeypatch.delitem(TASKS, "cells")  # the longest
    monkeypatch.setattr(train_tiny, "held_out", lambda count, seed=0, task="": [TASKS[task].problem(random.Random(1))])
    words = ["tiny-dream", "--batch", "1", "--threads", "1", "--steps", "4", "--out"]
    train_tiny.main([*words, str(tmp_path / "whole")])

    def stop(self, checkpoint, save=train_tiny.Training.save):
        save(self, checkpoint)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_tiny.Training, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train_tiny.main([*words, str(tmp_path / "parts")])
    train_tiny.main([*words, str(tmp_path / "parts")])
    whole, parts = (dkv.load(tmp_path / name, device="cpu", pack=False) for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    assert whole.spec == SPECS["tiny-dream"]
    log = [json.loads(line) for line in (tmp_path / "parts" / "training.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in log] == [None, 2, None, 4, 4]
    assert [line["from_step"] for line in log if "name" in line] == [0, 2] and log[0]["name"] == "tiny-dream"
    assert set(log[-1]["exact_of_500"]) == set(TASKS)


def test_a_torch_without_muon_is_named(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"torch.optim.Muon, which torch .* lacks: use 2.9 or newer"):
        train_tiny.Training("tiny", 0, 1e-3)
