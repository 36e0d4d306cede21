"""The training script: what a batch and its loss are, and that a stopped training goes on alike."""

import json
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

import dkv
from dkv.models.bundled import muon
from dkv.models.bundled import train as train_tiny
from dkv.models.bundled.recipes import LEAST_NEW, RECIPES, WINDOW
from dkv.models.bundled.tasks import ALL_TASKS, TASKS
from dkv.models.bundled.text import CHARACTERS, Text, plain
from dkv.models.bundled.train import loss_of

TINY = RECIPES["tiny"]


@pytest.mark.parametrize("task", ALL_TASKS)
def test_a_batch_is_prompts_answers_and_ends(task):
    widths = set()
    for seed in range(20):
        ids, prompt = TINY.batch_of(task, random.Random(seed), 2)
        rng = random.Random(seed)
        for row in ids.tolist():
            text = TINY.encode("".join(ALL_TASKS[task].problem(rng)))
            assert row[: len(text)] == text and set(row[len(text) :]) == {TINY.eos}
        widths.add(ids.shape[1] - prompt)
    assert ALL_TASKS[task].new_tokens in widths and len(widths) > 4


def novel(tmp_path, words=8000):
    """A file of different words, and paragraphs."""
    path = tmp_path / "novel.txt"
    path.write_text("\n\n".join(f"He was\n\u201ccalled\u201d_{i:b}_ and {i:o}." for i in range(words)), "utf-8")
    return path


def test_text_is_written_in_the_characters_that_there_are():
    assert (
        plain("It\u2019s  a _fine_\n day\u2014\u201cyes\u201d! \u00a32\n\n\nNo.\n\n***")
        == 'It\'s a fine day-"yes"! \nNo.'
    )
    assert set(CHARACTERS) >= set(plain("".join(map(chr, range(0x2030)))))


def test_windows_of_text_never_show_what_is_held_out(tmp_path):
    text, recipe = Text(novel(tmp_path), WINDOW), RECIPES["tiny-text"]
    assert len(text.unseen) > WINDOW and abs(len(text.seen) / len(text.unseen) - 49) < 1
    rng, prompts = random.Random(0), set()
    for _ in range(20):
        ids, prompt = recipe.batch_of("text", rng, 2, text)
        for row in ids.tolist():
            written = "".join(recipe.alphabet[i] for i in row)
            assert len(row) == WINDOW and written in text.seen and WINDOW - prompt >= LEAST_NEW
        assert text.window(rng, WINDOW, seen=False) in text.unseen
        prompts.add(prompt)
    assert 0 in prompts and len(prompts) > 4


def test_a_text_that_is_too_short_is_named(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Too short.")
    with pytest.raises(ValueError, match=r"short.txt has 10 characters in all; a window of 384 needs at least 19200"):
        Text(path, WINDOW)


class Oracle(nn.Module):
    """Gives the token of every slot the logit 20, or that of the next slot in a shifted model."""

    def __init__(self, spec, ids):
        super().__init__()
        self.spec, self.ids, self.seen = spec, ids, None

    def forward(self, x):
        self.seen = x
        target = self.ids.roll(-1, 1) if self.spec.shifted else self.ids
        return 20.0 * torch.nn.functional.one_hot(target, self.spec.vocab_size)


@pytest.mark.parametrize("name", ("tiny", "tiny-dream"))
def test_the_loss_is_that_of_masked_answer_slots(name):
    recipe = RECIPES[name]
    ids, prompt = recipe.batch_of("balance", random.Random(0), 16)
    oracle = Oracle(recipe.spec, ids)
    torch.manual_seed(0)
    loss, hit = loss_of(oracle, ids, prompt)
    assert loss < 1e-5 and hit == 1
    masked = oracle.seen == recipe.mask
    assert not masked[:, :prompt].any() and torch.equal(oracle.seen[~masked], ids[~masked])
    # t is spread evenly over the rows.
    assert masked[:, prompt:].float().mean(1).sort().values.diff().abs().max() < 0.3
    torch.manual_seed(0)
    oracle.ids = ids.roll(1, 0)
    assert loss_of(oracle, ids, prompt)[0] > 1


def test_the_loss_of_blocks_is_that_of_one_block():
    """What stands before it is known, and nothing stands behind it."""
    recipe = RECIPES["tiny-block"]
    ids, prompt = recipe.batch_of("balance", random.Random(0), 16)
    block, ends = recipe.spec.block_length, set()
    assert ids.shape[1] % block == 0
    for seed in range(12):
        torch.manual_seed(seed)
        oracle = Oracle(recipe.spec, ids)
        oracle.forward = lambda x, oracle=oracle: Oracle(recipe.spec, ids[:, : x.shape[1]]).forward(keep(oracle, x))
        assert loss_of(oracle, ids, prompt)[0] < 1e-5
        end = oracle.seen.shape[1]
        masked = oracle.seen == recipe.mask
        assert end % block == 0 and masked.any() and not masked[:, : max(prompt, end - block)].any()
        assert torch.equal(oracle.seen[~masked], ids[:, :end][~masked])
        ends.add(end)
    assert ends == set(range(-(-(prompt + 1) // block) * block, ids.shape[1] + 1, block))


def keep(oracle, x):
    oracle.seen = x
    return x


def test_a_stopped_training_goes_on_alike(tmp_path, monkeypatch, one_thread):
    recipe = RECIPES["tiny-dream"]
    small = replace(recipe.spec, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16)
    # Without the longest task.
    monkeypatch.setitem(RECIPES, "tiny-dream", replace(recipe, spec=small, tasks=("balance", "addition")))
    monkeypatch.setattr(train_tiny, "SAVE", 2)
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
    assert whole.spec == small
    log = [json.loads(line) for line in (tmp_path / "parts" / "training.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in log] == [None, 2, None, 4, 4]
    assert [line["from_step"] for line in log if "name" in line] == [0, 2] and log[0]["name"] == "tiny-dream"
    assert set(log[-1]["exact_of_500"]) == {"balance", "addition"}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has none before 2.9")
def test_muon_moves_matrices_as_that_of_torch():
    """Which turns them in bfloat16: alike to its rounding."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((24, 64), (64, 24), (32, 32), (24, 64))]
    own, theirs = ([torch.nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    rule = {"lr": 1e-2, "weight_decay": 0.01}
    optimizers = [muon.Muon(own, **rule), torch.optim.Muon(theirs, **rule, adjust_lr_fn="match_rms_adamw")]
    for _ in range(3):
        for a, b in zip(own, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, first in zip(own, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - first).norm()


def test_a_training_on_text_tells_its_loss_and_begins_with_other_weights(tmp_path, monkeypatch, one_thread):
    recipe = RECIPES["tiny-text"]
    small = replace(recipe.spec, hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32)
    monkeypatch.setitem(RECIPES, "tiny-text", replace(recipe, spec=small))
    monkeypatch.setattr(train_tiny, "WINDOWS", 2)
    words = ["tiny-text", "--text", str(novel(tmp_path)), "--batch", "1", "--threads", "1", "--steps", "1", "--out"]
    train_tiny.main([*words, str(tmp_path / "first")])
    line = json.loads((tmp_path / "first" / "training.jsonl").read_text().splitlines()[-1])
    assert 2 < line["unseen_loss"] < 8
    training = train_tiny.Training("tiny-text", seed=1, rate=1e-3)
    training.begin_with(str(tmp_path / "first"))
    first = dkv.load(tmp_path / "first", device="cpu", pack=False)
    assert all(torch.equal(a, b) for a, b in zip(training.model.parameters(), first.parameters(), strict=True))


@pytest.mark.parametrize("words", [["tiny-text"], ["tiny", "--text", "novel.txt"]])
def test_text_goes_with_the_model_of_text(words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_tiny.main([*words, "--out", str(tmp_path)])
    assert "--text FILE goes with tiny-text, and with no other" in capsys.readouterr().err
