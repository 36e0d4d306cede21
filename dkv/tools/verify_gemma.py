"""Replay of recorded runs of DiffusionGemma, whose draws are taken from the recording."""

from typing import Any

import torch
from torch import Tensor

from dkv.common.bar import counted
from dkv.core.kv_cache import KVCache
from dkv.engine.canvas import CanvasRun, Step
from dkv.engine.canvas_settings import NAMES, settings_of
from dkv.engine.denoise import Numbers
from dkv.tools.recorded import Case, Mismatch, compare

# Between implementations in float32.
TOLERANCE = 2e-4


def check_gemma(case: Case, model: Any) -> str:
    """Replay a case of DiffusionGemma.

    Returns:
        What was compared, in words.

    Raises:
        Mismatch: what differs, where, and the two values.
    """
    return (_check_forward if case.facts["kind"] == "forward" else _check_run)(case, model)


@torch.no_grad()
def _check_run(case: Case, model: Any) -> str:
    t = case.tensors
    ids = t["prompt"].long()
    mask = t["attention_mask"].bool() if "attention_mask" in t else torch.ones_like(ids, dtype=torch.bool)
    blocks, worst, steps = t["step_block"].tolist(), 0.0, 0

    def recorded(canvas: int) -> Numbers:
        renewed, drawn = (t[name].long()[t["step_block"] == canvas] for name in ("noise", "sampled"))
        return Numbers(t["canvas_init"][canvas].long(), renewed, torch.full(renewed.shape, 0.5), drawn)

    def check(step: Step) -> None:
        nonlocal worst, steps
        number = blocks.index(step.canvas) + step.number
        if number != steps:
            raise Mismatch(f"canvas {step.canvas} began at step {steps - step.number}, recorded {number - step.number}")
        found = {"canvas_in": step.before, "argmax": step.thought.best, "accepted": step.accepted}
        for name, tensor in {**found, "canvas_out": step.after, "finished": step.finished}.items():
            compare(name, tensor.long(), t[name][number][step.rows].long(), number)
        pairs = [("entropy", step.thought.entropy, t["entropy"][number])]
        if (logits := t.get(f"logits_step{number:03d}")) is not None:
            pairs.append(("logits", model.logits(step.hidden), logits))
        worst = max(worst, *(_difference(f"step {number}: {n}", x, y[step.rows]) for n, x, y in pairs))
        steps += 1

    settings = settings_of(model.spec, None, {name: v for name, v in case.settings.items() if name in NAMES})
    output = CanvasRun(model, ids, mask, settings, numbers_of=recorded, on_step=check).to_the_end(None, ids, 0)
    if steps != len(t["step_block"]):
        raise Mismatch(f"{steps} steps, recorded {len(t['step_block'])}")
    if not torch.equal(output.sequences, t["final"].long()):
        raise Mismatch("the final sequences differ from the recorded ones")
    return f"{counted(steps, 'step')}, logits and entropies within {worst:.1e}"


@torch.no_grad()
def _check_forward(case: Case, model: Any) -> str:
    t = case.tensors
    ids, canvas = t["input_ids"].long(), t["canvas"].long()
    (batch, known), slots = ids.shape, canvas.shape[1]
    buffer, starts = KVCache(batch, known + slots), torch.full((batch,), known)
    hidden: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: hidden.append(given[0])) for layer in model.layers]
    try:
        text = model.encode(ids, torch.zeros_like(starts), buffer)
        layers = buffer.layers.items()
        keys = {index: [x.numbers[:, :known].transpose(1, 2).clone() for x in pair] for index, pair in layers}
        rows = torch.arange(batch)
        encoder, _ = [x.unflatten(0, (batch, -1)) for x in hidden], hidden.clear()
        out = model.decode(canvas, rows, starts, buffer, None)
        decoder = [x.unflatten(0, (batch, -1)) for x in hidden]
    finally:
        for hook in hooks:
            hook.remove()
    logits = model.logits(out)
    again = model.logits(model.decode(canvas, rows, starts, buffer, model.soft((logits / 0.7).softmax(-1))))
    pairs = {"logits": logits, "logits_self_conditioned": again}
    pairs |= {f"encoder_hidden_{i}": x for i, x in enumerate([*encoder, text])}
    pairs |= {f"decoder_hidden_{i}": x for i, x in enumerate([*decoder, out])}
    for index, pair in keys.items():
        for name, x in zip(("key", "value"), pair, strict=True):
            # transformers keeps as many slots of a layer with a window as the next canvas sees.
            pairs[f"cache_{name}_{index}"] = x[:, :, -t[f"cache_{name}_{index}"].shape[2] :]
    worst = max(_difference(name, found, t[name]) for name, found in pairs.items())
    return f"one pass of each reader, logits, hidden states, keys and values within {worst:.1e}"


def _difference(name: str, found: Tensor, expected: Tensor) -> float:
    """The largest difference; Mismatch: it is more than `TOLERANCE`."""
    worst = (found - expected).abs().max().item() if found.numel() else 0.0
    if not worst <= TOLERANCE:
        raise Mismatch(f"{name} differs by {worst:.2e}, more than {TOLERANCE}")
    return worst
