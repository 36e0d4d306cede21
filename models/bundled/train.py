"""Train a bundled model with the LLaDA objective, on a CPU, from a seed.

Example:
    python -m dkv.models.bundled.train tiny --out models/tiny
    python -m dkv.models.bundled.train tiny-text --text novels.txt --out models/tiny-text

Each step draws fresh problems of every task, or windows of the text; a share t ~ U(0, 1) of every answer
is masked, and the loss is the cross-entropy at the masked slots divided by t (LLaDA, Nie et al. 2025,
algorithm 1); for a model that sees no later block, those of one block of the answer, drawn anew for each
batch. A checkpoint in the output folder is picked up again when the command is repeated; with more
--steps than before, the learning rate follows the schedule of the longer training from there on. The folder
then holds a checkpoint in the format of the family, a tokenizer, and the log of the training. The same
seed gives the same weights on the same machine with the same number of threads.
"""

from dkv.common import process

if __name__ == "__main__":
    # Before torch is imported, which takes seconds.
    process.begin("python -m dkv.models.bundled.train")

import argparse
import json
import math
import random
import time
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dkv
from dkv.common import files
from dkv.common.bar import Bar
from dkv.models.bundled.muon import Muon
from dkv.models.bundled.recipes import LEAST_NEW, RECIPES, WINDOW, Recipe
from dkv.models.bundled.tasks import ALL_TASKS, held_out
from dkv.models.bundled.text import Text
from dkv.models.export import save_model, save_tokenizer
from dkv.models.transformer import Transformer
from dkv.version import versions

CHECKPOINT, LOG = "checkpoint.pt", "training.jsonl"
# What the folder holds at the end.
WRITTEN = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
# Every so many steps the log is written and the checkpoint saved, and of these every other one with answers.
SAVE, ANSWERS = 250, 500
# Windows of unseen text whose loss is told.
WINDOWS = 128


def loss_of(model: Transformer, ids: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """The LLaDA loss, and the share of masked slots whose best guess is right.

    Where a slot sees no later block, it is that of one block of the answer, drawn for the batch by its slots to fill:
    what stands before it is known, and what stands behind it is cut off.
    """
    if (block := model.spec.block_length) is not None:
        end = (int(torch.randint(prompt, ids.shape[1], ())) // block + 1) * block
        ids, prompt = ids[:, :end], max(prompt, end - block)
    batch, length = ids.shape
    # One offset for the batch spreads t evenly over (0, 1): same mean, less noise.
    t = ((torch.arange(batch) + torch.rand(1)) / batch).clamp_(min=1e-2)
    masked = torch.rand(batch, length) < t[:, None]
    masked[:, :prompt] = False
    logits = model(ids.masked_fill(masked, model.spec.mask_token_id))
    logits = logits[:, prompt - 1 : -1] if model.spec.shifted else logits[:, prompt:]
    ids, masked = ids[:, prompt:], masked[:, prompt:]
    loss = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    hit = (logits.argmax(-1) == ids)[masked].float().mean()
    return (loss * masked / t[:, None]).mean(), hit


def exact_answers(model: Transformer, recipe: Recipe, task: str, problems: list[tuple[str, str]]) -> float:
    """Share of problems answered exactly by plain decoding."""
    new, found = ALL_TASKS[task].new_tokens, 0
    for start in range(0, len(problems), 32):
        prompts, answers = zip(*problems[start : start + 32], strict=True)
        ids = torch.tensor([recipe.encode(p) for p in prompts])
        output = dkv.generate(model, ids, max_new_tokens=new, schedule="blocks")
        want = torch.tensor([recipe.encode(a) + [recipe.eos] * (new - len(a)) for a in answers])
        found += int((output.sequences[:, ids.shape[1] :] == want).all(-1).sum())
    return found / len(problems)


@torch.no_grad()
def unseen_loss(model: Transformer, recipe: Recipe, text: Text) -> float:
    """The loss on windows of the text that training does not see, in nats a character."""
    rng = random.Random("unseen")
    windows = torch.tensor([recipe.encode(text.window(rng, WINDOW, seen=False)) for _ in range(WINDOWS)])
    torch.manual_seed(0)
    return mean(loss_of(model, part, WINDOW - LEAST_NEW)[0].item() for part in windows.split(16))


def optimizers(model: Transformer, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for tables, norms and biases, at one learning rate."""
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        Muon(matrices, lr=rate),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


class Training:
    """A model on its way; everything that a checkpoint holds.

    Args:
        name: of the recipe.
        text: what a recipe of text is trained on.
        problems: of each task, answered at the end.
    """

    def __init__(self, name: str, seed: int, rate: float, text: Text | None = None, problems: int = 500):
        torch.manual_seed(seed)
        self.recipe, self.text, self.problems = RECIPES[name], text, problems
        self.model, self.seed, self.rate = Transformer(self.recipe.spec), seed, rate
        for parameter in self.model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.08)
        self.optimizers = optimizers(self.model, rate)
        self.step, self.saved, self.seconds = 0, 0, 0.0

    def begin_with(self, folder: str) -> None:
        """Take the weights of a model of the same shape."""
        self.model.load_state_dict(dkv.load(folder, device="cpu", dtype=torch.float32, pack=False).state_dict())

    def load(self, checkpoint: Path) -> None:
        state = torch.load(checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        self.step = self.saved = state["step"]
        self.seconds = state["seconds"]

    def save(self, checkpoint: Path) -> None:
        state = {"model": self.model.state_dict(), "step": self.step, "seconds": self.seconds}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        with files.writing(checkpoint) as part:
            torch.save(state, part)
        self.saved = self.step

    def take_step(self, steps: int, batch: int) -> dict[str, tuple[float, float]]:
        """One step of `steps`; the loss and the share of right guesses by task."""
        # Problems and masks depend on the seed and the step alone, so a resumed run repeats them.
        rng = random.Random(f"train-{self.seed}-{self.step}")
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        warm, cooled = min(1.0, (self.step + 1) / 100), 0.5 * (1 + math.cos(math.pi * self.step / steps))
        found = {}
        tasks = self.recipe.tasks
        for task in tasks:
            loss, hit = loss_of(self.model, *self.recipe.batch_of(task, rng, batch, self.text))
            (loss / len(tasks)).backward()
            found[task] = (loss.item(), hit.item())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * warm * max(cooled, 0.02)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return found

    def run(self, out: Path, steps: int, batch: int) -> None:
        """Train to `steps`; save the checkpoint and add to the log as it goes."""
        bar = Bar(steps, "step")
        bar.update(self.step)
        recent: list[dict[str, tuple[float, float]]] = []
        tick = time.perf_counter()
        while self.step < steps:
            recent = [*recent[-49:], self.take_step(steps, batch)]
            bar.update()
            if self.step % SAVE and self.step != steps:
                continue
            self.seconds += time.perf_counter() - tick
            line = {"step": self.step, "seconds": round(self.seconds)}
            for number, name in enumerate(("loss", "hit")):
                line[name] = {t: round(mean(found[t][number] for found in recent), 4) for t in self.recipe.tasks}
            if self.step % ANSWERS == 0:
                line |= self.measured(min(16, self.problems), seed=1)
            files.append_line(out / LOG, json.dumps(line))
            bar.print(json.dumps(line))
            self.save(out / CHECKPOINT)
            tick = time.perf_counter()

    def measured(self, problems: int, **seed: int) -> dict[str, Any]:
        """What the model can do: exact answers to so many unseen problems, or the loss on unseen text."""
        if self.text is not None:
            return {"unseen_loss": round(unseen_loss(self.model, self.recipe, self.text), 4)}
        if not problems:
            return {}
        tasks = {task: held_out(problems, task=task, **seed) for task in self.recipe.tasks}
        return {"exact": {task: exact_answers(self.model, self.recipe, task, found) for task, found in tasks.items()}}

    def kept(self, out: Path) -> str:
        """What a stopped training leaves, and how to go on."""
        if not self.saved:
            return ""
        return f"step {self.saved} of {self.step} is kept in {out / CHECKPOINT}: repeat the command to go on"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dkv.models.bundled.train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=RECIPES, help="which model: %(choices)s")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what tiny-text is trained on, in UTF-8")
    parser.add_argument("--begin-with", metavar="MODEL", help="take the weights of a model of the same shape at first")
    parser.add_argument("--steps", type=int, default=5000, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=10, help="problems a step and task (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, problems and masks (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    parser.add_argument(
        "--problems",
        type=int,
        default=500,
        help="unseen problems of each task answered at the end; 0: none, long ones take hours (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if (args.text is None) == ("text" in RECIPES[args.name].tasks):
        parser.error("--text FILE goes with tiny-text, and with no other")
    for name in (CHECKPOINT, LOG):
        files.check_writable("--out", args.out / name, regular=True)
    files.check_outputs(("--out", args.out / name) for name in WRITTEN)
    text = None if args.text is None else Text(args.text, WINDOW)
    training = Training(args.name, args.seed, args.rate, text, args.problems)
    if (args.out / CHECKPOINT).exists():
        training.load(args.out / CHECKPOINT)
        print(f"resuming at step {training.step}")
    elif args.begin_with is not None:
        training.begin_with(args.begin_with)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "text")}
    line = {"from_step": training.step, **settings, "threads": torch.get_num_threads(), **versions()}
    files.append_line(args.out / LOG, json.dumps(line))
    with process.keeping(lambda: training.kept(args.out)):
        training.run(args.out, args.steps, args.batch)
    recipe = training.recipe
    save_model(training.model, args.out)
    save_tokenizer(args.out, recipe.alphabet, recipe.eos, recipe.mask, training.model.spec.family)
    found = training.measured(args.problems)
    if "exact" in found:
        found[f"exact_of_{args.problems}"] = found.pop("exact")
    files.append_line(args.out / LOG, json.dumps({"step": training.step, **found}))
    print(json.dumps(found))


if __name__ == "__main__":
    process.run(main)
