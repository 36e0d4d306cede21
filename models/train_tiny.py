"""Train the bundled model with the LLaDA objective, on a CPU, from a seed.

Example:
    python -m dkv.models.train_tiny --out models/tiny

Each batch draws fresh problems; a share t ~ U(0, 1) of every answer is masked, and the loss is the
cross-entropy at the masked slots divided by t (LLaDA, Nie et al. 2025, algorithm 1). A checkpoint
in the output folder is picked up again when the command is repeated. The folder then holds a
checkpoint in LLaDA's format, a tokenizer, and the log of the training.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dkv.models.export import save_llada, save_tokenizer
from dkv.models.spec import ModelSpec
from dkv.models.tasks import balance, held_out
from dkv.models.transformer import Transformer

ALPHABET = "0123456789+-= "
EOS, MASK = len(ALPHABET), len(ALPHABET) + 1
ANSWER = 64
SPEC = ModelSpec(
    family="llada", vocab_size=16, hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32,
    intermediate_size=384, max_positions=512, rope_theta=200.0, norm_eps=1e-5,
    mask_token_id=MASK, eos_token_id=EOS, pad_token_id=EOS,
)  # fmt: skip


def encode(text: str) -> list[int]:
    return [ALPHABET.index(c) for c in text]


def batch_of(rng: random.Random, size: int) -> tuple[Tensor, int]:
    """Token ids [size, prompt + answer] of fresh problems, and the length of the prompt."""
    problems = [balance(rng) for _ in range(size)]
    prompt = len(problems[0][0])
    rows = [encode(p + a) for p, a in problems]
    return torch.tensor([r + [EOS] * (prompt + ANSWER - len(r)) for r in rows]), prompt


def loss_of(model: Transformer, ids: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """The LLaDA loss, and the share of masked slots whose best guess is right."""
    batch, length = ids.shape
    # One offset for the batch spreads t evenly over (0, 1): same mean, less noise.
    t = ((torch.arange(batch) + torch.rand(1)) / batch).clamp_(min=1e-2)
    masked = torch.rand(batch, length) < t[:, None]
    masked[:, :prompt] = False
    logits = model(ids.masked_fill(masked, MASK))
    weight = (masked / t[:, None])[:, prompt:]
    loss = F.cross_entropy(logits[:, prompt:].transpose(1, 2), ids[:, prompt:], reduction="none")
    hit = (logits.argmax(-1) == ids)[masked].float().mean()
    return (loss * weight).sum() / (batch * (length - prompt)), hit


@torch.no_grad()
def exact_answers(model: Transformer, problems: list[tuple[str, str]]) -> float:
    """Share of problems answered exactly by decoding the most confident slot at every step."""
    prompt = torch.tensor([encode(p) for p, _ in problems])
    canvas = torch.cat((prompt, prompt.new_full((len(problems), ANSWER), MASK)), 1)
    for _ in range(ANSWER):
        probability, token = model(canvas).softmax(-1).max(-1)
        best = probability.masked_fill(canvas != MASK, -1).argmax(-1, keepdim=True)
        canvas.scatter_(1, best, token.gather(1, best))
    want = torch.tensor([encode(a) + [EOS] * (ANSWER - len(a)) for _, a in problems])
    return (canvas[:, prompt.shape[1] :] == want).all(-1).float().mean().item()


def train(model: Transformer, out: Path, steps: int, batch: int, peak_rate: float, seed: int) -> None:
    """Train to `steps`, resuming from and saving to `out / "checkpoint.pt"`; log to training.jsonl."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    checkpoint, log = out / "checkpoint.pt", out / "training.jsonl"
    start, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["step"], state["seconds"]
        print(f"resuming at step {start}")
    bar = tqdm(range(start, steps), initial=start, total=steps, unit="step", smoothing=0.02)
    tick, mean = time.perf_counter(), {"loss": 0.0, "hit": 0.0}
    for step in bar:
        # Problems and masks depend on the seed and the step alone, so a resumed run repeats them.
        rng = random.Random(f"train-{seed}-{step}")
        torch.manual_seed(seed * 1_000_003 + step)
        warm, cooled = min(1.0, (step + 1) / 200), 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * warm * max(cooled, 0.02)
        loss, hit = loss_of(model, *batch_of(rng, batch))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, value in (("loss", loss), ("hit", hit)):
            mean[name] += (value.item() - mean[name]) / min(step % 250 + 1, 50)
        bar.set_postfix(loss=f"{mean['loss']:.3f}", hit=f"{mean['hit']:.3f}", refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            seconds, tick = seconds + time.perf_counter() - tick, time.perf_counter()
            exact = exact_answers(model, held_out(50, seed=1)) if (step + 1) % 500 == 0 else None
            line = {"step": step + 1, "loss": mean["loss"], "hit": mean["hit"], "exact": exact, "seconds": seconds}
            with log.open("a") as f:
                f.write(json.dumps(line) + "\n")
            bar.write(json.dumps(line))
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "seconds": seconds,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            tick = time.perf_counter()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dkv.models.train_tiny", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("models/tiny"), help="folder to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3000, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="problems a step (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, problems and masks")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = Transformer(SPEC)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.08)
    train(model, args.out, args.steps, args.batch, args.rate, args.seed)
    save_llada(model, args.out)
    save_tokenizer(args.out, ALPHABET, EOS, MASK)
    print(f"{args.out}: {exact_answers(model, held_out(200)):.1%} of 200 unseen problems answered exactly")


if __name__ == "__main__":
    main()
