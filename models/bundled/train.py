"""Train a bundled model with the LLaDA objective, on a CPU, from a seed.

Example:
    python -m dkv.models.bundled.train tiny --out models/tiny

Each step draws fresh problems of every task; a share t ~ U(0, 1) of every answer is masked, and the
loss is the cross-entropy at the masked slots divided by t (LLaDA, Nie et al. 2025, algorithm 1). A
checkpoint in the output folder is picked up again when the command is repeated; with more --steps than
before, the learning rate follows the schedule of the longer training from there on. The folder then
holds a checkpoint in the format of the family, a tokenizer, and the log of the training. The same
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

import torch
import torch.nn.functional as F
from torch import Tensor

import dkv
from dkv.common import files
from dkv.common.bar import Bar
from dkv.models.bundled.tasks import TASKS, held_out
from dkv.models.export import save_model, save_tokenizer
from dkv.models.spec import ModelSpec
from dkv.models.transformer import Transformer
from dkv.version import versions

ALPHABET = "0123456789+-= .#/"
EOS, MASK = len(ALPHABET), len(ALPHABET) + 1
_SIZES = {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "head_dim": 32, "intermediate_size": 384}
_IDS = {"vocab_size": len(ALPHABET) + 2, "mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": EOS}
_BOTH = {**_SIZES, **_IDS, "max_positions": 512, "rope_theta": 200.0}
_DREAM = {"num_kv_heads": 2, "norm_eps": 1e-6, "qkv_bias": True, "shifted": True, "rope_float32": False}
SPECS = {
    "tiny": ModelSpec("llada", num_kv_heads=4, norm_eps=1e-5, **_BOTH),
    "tiny-dream": ModelSpec("dream", **_DREAM, **_BOTH),
}
CHECKPOINT, LOG = "checkpoint.pt", "training.jsonl"
# What the folder holds at the end.
WRITTEN = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
# Every so many steps the log is written and the checkpoint saved, and of these every other one with answers.
SAVE, ANSWERS = 250, 500
# A batch may have so many slots more behind its answers than they need.
SPARE = 64


def encode(text: str) -> list[int]:
    return [ALPHABET.index(c) for c in text]


def batch_of(task: str, rng: random.Random, size: int) -> tuple[Tensor, int]:
    """Token ids [size, prompt + new] of fresh problems, and the length of the prompt.

    Half of the canvases are as long as the task's own, the others of any length that holds the answer.
    """
    problems = [TASKS[task].problem(rng) for _ in range(size)]
    prompt, answer = map(len, problems[0])
    new = TASKS[task].new_tokens if rng.random() < 0.5 else answer + 1 + rng.randrange(SPARE)
    return torch.tensor([encode(p + a) + [EOS] * (new - answer) for p, a in problems]), prompt


def loss_of(model: Transformer, ids: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """The LLaDA loss, and the share of masked slots whose best guess is right."""
    batch, length = ids.shape
    # One offset for the batch spreads t evenly over (0, 1): same mean, less noise.
    t = ((torch.arange(batch) + torch.rand(1)) / batch).clamp_(min=1e-2)
    masked = torch.rand(batch, length) < t[:, None]
    masked[:, :prompt] = False
    logits = model(ids.masked_fill(masked, MASK))
    logits = logits[:, prompt - 1 : -1] if model.spec.shifted else logits[:, prompt:]
    ids, masked = ids[:, prompt:], masked[:, prompt:]
    loss = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    hit = (logits.argmax(-1) == ids)[masked].float().mean()
    return (loss * masked / t[:, None]).mean(), hit


def exact_answers(model: Transformer, task: str, problems: list[tuple[str, str]]) -> float:
    """Share of problems answered exactly by plain decoding."""
    new, found = TASKS[task].new_tokens, 0
    for start in range(0, len(problems), 32):
        prompts, answers = zip(*problems[start : start + 32], strict=True)
        ids = torch.tensor([encode(p) for p in prompts])
        output = dkv.generate(model, ids, max_new_tokens=new, schedule="blocks")
        want = torch.tensor([encode(a) + [EOS] * (new - len(a)) for a in answers])
        found += int((output.sequences[:, ids.shape[1] :] == want).all(-1).sum())
    return found / len(problems)


def optimizers(model: Transformer, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for tables, norms and biases, at one learning rate."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"training needs torch.optim.Muon, which torch {torch.__version__} lacks: use 2.9 or newer")
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


class Training:
    """A model on its way; everything that a checkpoint holds."""

    def __init__(self, name: str, seed: int, rate: float):
        torch.manual_seed(seed)
        self.model, self.seed, self.rate = Transformer(SPECS[name]), seed, rate
        for parameter in self.model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.08)
        self.optimizers = optimizers(self.model, rate)
        self.step, self.saved, self.seconds = 0, 0, 0.0

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
        for task in TASKS:
            loss, hit = loss_of(self.model, *batch_of(task, rng, batch))
            (loss / len(TASKS)).backward()
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
                line[name] = {t: round(mean(found[t][number] for found in recent), 4) for t in TASKS}
            if self.step % ANSWERS == 0:
                line["exact"] = {t: exact_answers(self.model, t, held_out(16, seed=1, task=t)) for t in TASKS}
            files.append_line(out / LOG, json.dumps(line))
            bar.print(json.dumps(line))
            self.save(out / CHECKPOINT)
            tick = time.perf_counter()

    def kept(self, out: Path) -> str:
        """What a stopped training leaves, and how to go on."""
        if not self.saved:
            return ""
        return f"step {self.saved} of {self.step} is kept in {out / CHECKPOINT}: repeat the command to go on"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dkv.models.bundled.train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=SPECS, help="which model: %(choices)s")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=5000, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=10, help="problems a step and task (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, problems and masks (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    for name in (CHECKPOINT, LOG):
        files.check_writable("--out", args.out / name, regular=True)
    files.check_outputs(("--out", args.out / name) for name in WRITTEN)
    training = Training(args.name, args.seed, args.rate)
    if (args.out / CHECKPOINT).exists():
        training.load(args.out / CHECKPOINT)
        print(f"resuming at step {training.step}")
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    line = {"from_step": training.step, **settings, "threads": torch.get_num_threads(), **versions()}
    files.append_line(args.out / LOG, json.dumps(line))
    with process.keeping(lambda: training.kept(args.out)):
        training.run(args.out, args.steps, args.batch)
    save_model(training.model, args.out)
    save_tokenizer(args.out, ALPHABET, EOS, MASK, training.model.spec.family)
    exact = {task: exact_answers(training.model, task, held_out(500, task=task)) for task in TASKS}
    files.append_line(args.out / LOG, json.dumps({"step": training.step, "exact_of_500": exact}))
    print(*(f"{task}: {share:.1%} of 500 unseen problems answered exactly" for task, share in exact.items()), sep="\n")


if __name__ == "__main__":
    process.run(main)
