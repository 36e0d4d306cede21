"""Generations by one process or several, and the processes that run them: `python -m tests.dkv.sharing quick FOLDER`.

Models are in float64, where sums that are added up in another order decide no token.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import MaxLengthCriteria

import dkv
import dkv.parallel
from dkv.models.families import FAMILIES as ALL
from dkv.models.families.diffusion_gemma import FAMILY
from dkv.models.gemma import Gemma
from dkv.models.loader import spec_of
from dkv.policies import POLICIES
from tests.dkv.engine.test_families_in_company import OPTIONS

ROOT = Path(__file__).parents[2]
GOLDEN = Path("tests/golden")
PLAIN = {"llada": GOLDEN / "llada_mha", "dream": GOLDEN / "dream_gqa"}
FAMILIES = sorted(
    path.parent.relative_to(ROOT)
    for path in (ROOT / GOLDEN / "families").glob("*/*/config.json")
    # One key head, which cannot be split.
    if path.parent.name not in ("gemma_tiny", "sdar_tied")
)
RULES = [
    {"temperature": 0.7},
    {"threshold": 0.1},
    {"confidence": "margin"},
    {"confidence": "entropy", "entropy_bound": 3.0},
    {"confidence": "random"},
    {"factor": 0.5},
    {"cfg_scale": 0.5},
    {"temperature": 0.9, "top_k": 6, "top_p": 0.8},
    {"vocab_limit": 40, "eos_token_id": [3, 9, 20, 31], "pad_token_id": 0},
    {"eos_token_id": [3, 9, 20, 31], "logits_eos_inf": True},
    {"eos_token_id": [3, 9, 20, 31], "confidence_eos_eot_inf": True},
    {"confidence_dtype": "model", "temperature": 0.5},
    {"certainty": 3.0, "steps": 4},
    {"kv_cache_dtype": "int8"},
]
# Families that a configuration does not name.
UNMARKED = {name: name for name, family in ALL.items() if family.unmarked}
# What is said of a process that was killed.
WITHOUT = "process {} of 2 has ended without a word: it was killed, or its machine is gone\n"
# From a name to a folder, what is done there, and with which settings.
Case = tuple[str, Path, str, dict[str, Any]]


def policy(name: str) -> dict[str, Any]:
    slides = {"schedule": "sliding"} if name == "sliding" else {}
    return {"cache": {"name": name, **OPTIONS.get(name, {})}, "block_length": 4, **slides}


def held_out(root: Path) -> Iterator[Case]:
    """Policies and some rules, with every model in a folder."""
    new = {"max_new_tokens": [5, 7], "seed": [3, 4]}
    for folder in sorted(root.iterdir()):
        if folder.name == "diffusion_gemma":
            steps = {"max_new_tokens": 12, "max_denoising_steps": 4, "entropy_bound": 1.0, "vocab_limit": None}
            yield folder.name, folder, "canvas", {**steps, "seed": 6}
            continue
        full = spec_of(folder, UNMARKED.get(folder.name)).attention == "full"
        for number, name in enumerate(POLICIES if full else ("none", "decode", "dual")):
            for rule in ({}, RULES[(5 * number + len(folder.name)) % len(RULES)]):
                call = {**policy(name), "block_length": None, **new, **rule}
                yield f"{folder.name} {name} {rule}", folder, "generate", call
        yield f"{folder.name} infill", folder, "infill", {"seed": 5}


def cases(kind: str, gemma: Path) -> Iterator[Case]:
    """The quick ones, the sweep over all that goes together, or those of models of which there is a folder."""
    if kind == "held out":
        yield from held_out(gemma)
        return
    new = {"max_new_tokens": [4, 5] if kind == "quick" else [6, 9], "seed": [3, 4]}
    for i, ((family, folder), name) in enumerate(product(PLAIN.items(), POLICIES)):
        if kind == "quick" and family == "dream" and name not in ("decode", "dual", "elastic", "skip"):
            continue
        # Every rule meets a few policies.
        some = range(1) if kind == "quick" else (0, *(1 + (5 * i + 3 * j) % len(RULES) for j in range(2)))
        for number in some:
            yield f"{family} {name} {number}", folder, "generate", {**policy(name), **new, **[{}, *RULES][number]}
    for number, rule in enumerate(RULES):
        yield f"rule {number}", PLAIN["llada"], "generate", {**policy("decode"), **new, **rule}
    for folder in FAMILIES:
        own = {} if "sdar" in folder.name or kind == "quick" else {"block_length": 8}
        names = ["decode"] if kind == "quick" else ["none", "decode", "dual"]
        for name, (number, rule) in product(names, enumerate([{}] if kind == "quick" else [{}, *RULES[:2]])):
            call = {"cache": name, **new, **rule, **own}
            yield f"{folder.name} {name} {number}", folder, "generate", call
    drafts = GOLDEN / "families" / "nemotron" / "nemotron_tiny"
    for threshold in (None, 0.4):
        yield f"drafts {threshold}", drafts, "generate", {"schedule": "speculative", **new, "threshold": threshold}
    for seed in (1, 2) if kind == "quick" else range(6):
        steps = {"max_new_tokens": 16, "max_denoising_steps": 5, "entropy_bound": 1.0, "vocab_limit": None}
        yield f"canvas {seed}", gemma, "canvas", {**steps, "seed": seed}
    for what in ("infill", "gaps", "again", "criteria", "processor", "logits", "seeds"):
        yield what, PLAIN["llada"], what, {**policy("dual"), "seed": 5}


@cache
def loaded(folder: Path, ranks: Any) -> Any:
    where = {"device": "cpu"} if ranks is None else {"ranks": ranks}
    return dkv.load(ROOT / folder, dtype="float64", family=UNMARKED.get(folder.name), **where)


def found(case: Case, ranks: Any = None) -> Any:
    """What a case gives, as JSON has it; None where its settings do not go together."""
    _, folder, what, call = case
    model = loaded(folder, ranks)
    ids = torch.randint(0, 60, (2, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    if what == "generate":
        try:
            output = dkv.generate(model, ids, mask, **call)
        except ValueError:
            return None
        return [output.sequences.tolist(), output.stats.computed_slots]
    if what == "canvas":
        call.pop("vocab_limit")
        return dkv.generate(model, ids, mask, **call).sequences.tolist()
    if what == "infill":
        # Slots of a row without a token would tie, and rounding decide.
        ids[:, 3:] = model.spec.mask_token_id
        return dkv.infill(model, ids, mask, **call).sequences.tolist()
    if what == "gaps":
        return dkv.fill_gaps(model, [[5, 9, dkv.Gap(0, 3), 7, 8], [4, dkv.Gap(2, 2), 3]], **call).rows
    call["max_new_tokens"] = 6
    if what == "again":
        first = dkv.generate(model, ids, **call)
        longer = torch.cat((first.sequences, ids[:, :2]), 1)
        output = dkv.generate(model, longer, kv_cache=first.kv_cache, **call)
        return [output.sequences.tolist(), output.stats.reused_slots]
    if what == "criteria":
        return dkv.generate(model, ids, stopping_criteria=[MaxLengthCriteria(8)], **call).sequences.tolist()
    if what == "processor":
        return dkv.generate(model, ids, logits_processor=lambda text, x: -x, **call).sequences.tolist()
    if what == "logits":
        output = dkv.generate(model, ids, output_logits=True, **call)
        return [x.argmax(-1).tolist() for x in output.logits]
    # Seeds that nobody gave are those of one process.
    torch.manual_seed(8 if ranks is None else 8 + ranks.rank)
    return dkv.generate(model, ids, **{**call, "seed": None, "temperature": 1.0}).sequences.tolist()


def small_gemma(folder: Path) -> Path:
    """A DiffusionGemma model whose layers all have two key heads, with random weights."""
    config = json.loads((ROOT / GOLDEN / "families/diffusion_gemma/gemma_tiny/config.json").read_text())
    for layer in config["text_config"]["per_layer_config"].values():
        layer["num_key_value_heads"] = 2
    model, noise = Gemma(FAMILY.spec(config)), torch.Generator().manual_seed(0)
    tensors = {}
    for name, (piece,) in FAMILY.pieces({n: tuple(p.shape) for n, p in model.named_parameters()}).items():
        x = torch.randn(piece.shape, generator=noise)
        tensors[name] = 1 + 0.03 * x if x.dim() == 1 else 0.3 * x
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def started(count: int, *command: object, **popen: Any) -> list[subprocess.Popen]:
    """Processes that share a model, as `torchrun` would start them, without its own."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env = {**os.environ, **env, "WORLD_SIZE": str(count)}
    how = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen}
    words = [sys.executable, *map(str, command)]
    return [subprocess.Popen(words, env={**env, "RANK": str(rank)}, **how) for rank in range(count)]


def main(kind: str, gemma: str) -> None:
    torch.set_num_threads(1)
    with dkv.parallel.start("cpu") as ranks:
        for case in cases(kind, Path(gemma)):
            result = found(case, ranks)
            ranks.check_same(result=result)
            if ranks.rank == 0:
                print(json.dumps([case[0], result]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
