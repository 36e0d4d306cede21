"""DiffusionGemma on a CPU: as `dkv.load` has it, against transformers' class and loop, on the same random weights.

    python -m dkv.bench.speed.gemma --prompt 128 --canvas 64 --steps 8

Both make as many steps as they may, as random weights are never sure. Each draws its own random numbers, so that tokens
are not compared here: `tests/dkv/engine/test_canvas_published.py` does so, with the same numbers for both.
"""

import argparse
import shlex
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import dkv
from dkv.bench.machine import facts
from dkv.bench.report import columns
from dkv.bench.shapes import CHOSEN, EXPERTS, SHAPES, shape
from dkv.bench.timing import in_turn, timed
from dkv.common import files
from dkv.models import ModelSpec

# Every so many layers see all, the others a window; and the last one sees all.
EVERY, WINDOW = 6, 1024
# A canvas is finished below this mean entropy, in nats: in no step.
NEVER = 1e-9


def theirs(sizes: ModelSpec, canvas: int) -> Any:
    """transformers' model of seeded noise in the sizes of another one; `canvas` slots are denoised together."""
    from transformers import DiffusionGemmaForBlockDiffusion

    kinds = ["sliding_attention" if (i + 1) % EVERY else "full_attention" for i in range(sizes.num_layers - 1)]
    kinds.append("full_attention")
    heads = max(sizes.num_heads // 4, 1)
    own = {"head_dim": sizes.head_dim, "num_key_value_heads": heads}
    text = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        **own,
        # The dense MLP and the chosen experts share what is the MLP of a dense model.
        "intermediate_size": sizes.intermediate_size // 2,
        "moe_intermediate_size": max(sizes.intermediate_size // 2 // CHOSEN, 1),
        "num_experts": EXPERTS,
        "top_k_experts": CHOSEN,
        "layer_types": kinds,
        "per_layer_config": {str(i): own for i, kind in enumerate(kinds) if kind == "full_attention"},
        "sliding_window": WINDOW,
        "max_position_embeddings": sizes.max_positions,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    images = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    kind = DiffusionGemmaForBlockDiffusion.config_class
    torch.manual_seed(0)
    model = DiffusionGemmaForBlockDiffusion(kind(text_config=text, vision_config=images, canvas_length=canvas))
    for parameter in model.eval().requires_grad_(False).parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    return model


def measure(sizes: ModelSpec, prompt: int, canvas: int, steps: int, rounds: int) -> dict[str, Any]:
    """One canvas by each in turn.

    Returns:
        {"rows": [{"prompt", "canvas", "steps", "parameters", "seconds", "eager_seconds", "speed"}]}: medians, `speed`
        of the ratios within a round.
    """
    model = theirs(sizes, canvas)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = dkv.load(folder, device="cpu")
    ids = torch.randint(2, sizes.vocab_size - 1, (1, prompt), generator=torch.Generator().manual_seed(1))
    how = {"max_new_tokens": canvas, "max_denoising_steps": steps, "confidence_threshold": NEVER}
    calls = {
        "eager": partial(model.generate, ids, attention_mask=torch.ones_like(ids), **how),
        "dkv": partial(dkv.generate, ours, ids, **how, eos_token_id=[]),
    }
    for call in calls.values():
        call()
    found = in_turn({name: lambda call=call: timed(call, ids.device)[0] for name, call in calls.items()}, rounds)
    row = {"prompt": prompt, "canvas": canvas, "steps": steps, "parameters": ours.num_parameters}
    row |= {"seconds": statistics.median(found["dkv"]), "eager_seconds": statistics.median(found["eager"])}
    ratios = (a / b for a, b in zip(found["eager"], found["dkv"], strict=True))
    return {"rows": [row | {"speed": statistics.median(ratios)}]}


def table(found: dict[str, Any]) -> str:
    """The seconds of both, and their ratio."""
    (row,) = found["rows"]
    times = (f"{row['seconds']:.2f}", f"{row['eager_seconds']:.2f}", f"{row['speed']:.2f}x")
    what = f"{row['canvas']} slots, {row['steps']} steps"
    return columns(("DiffusionGemma", "s", "transformers, s", "speed"), [(what, *times)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="d512x8", help="whose sizes the model has")
    for name, default in {"prompt": 128, "canvas": 256, "steps": 8, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures")
    asked = parser.parse_args()
    known = facts(torch.device("cpu"), shlex.join(["python", "-m", "dkv.bench.speed.gemma", *sys.argv[1:]]))
    found = measure(shape(asked.shape), asked.prompt, asked.canvas, asked.steps, asked.rounds)
    print(table(found))
    if asked.json is not None:
        files.write_json(asked.json, {"facts": known | {"model": asked.shape}, "gemma": found}, indent=1)


if __name__ == "__main__":
    main()
