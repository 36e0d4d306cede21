"""What is said of a model beside its files, and what `dkv info MODEL` says of one."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

# Slots of a row at which the memory of keys and values is told, besides the most that a model takes.
LENGTHS = (1024, 4096, 16384)
# Memory of devices, in GiB, of which it is told how many slots fit.
DEVICES = (8, 16, 24, 48, 80)
# Slots that a step computes, of which it is told what it reads: a block of LLaDA's.
COMPUTED = 32
PATTERNS = {
    "full": "every slot sees all",
    "block": "a slot sees its block and all before it",
    "prefix_causal": "a slot sees its block while it is filled, and before it as a causal model",
}


def add_weights(add: Any) -> None:
    """The options that `weights` reads."""
    add("--dtype", help="auto, float32, bfloat16, float16 or float64 (default: auto, on a CPU at least float32)")
    fewer = "int8: weights of products in 8 bits; int4: in 4 bits, on a GPU (default: of the dtype; docs/devices.md)"
    add("--weights", metavar="KIND", help=fewer)
    add("--keep-head", action="store_true", help="with --weights, leave those of the head in the dtype")


def weights(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `dkv.load` that say how weights are held."""
    return {"dtype": args.dtype, "weights": args.weights, **({"keep_head": True} if args.keep_head else {})}


def add_told(add: Any) -> None:
    """The options that `told` reads."""
    add("--family", help="of a model whose configuration does not tell, such as stable_diffcoder")
    add("--mask-token-id", type=int, metavar="ID", help="of a model whose files do not tell")
    add("--attention-block", type=int, metavar="N", help="slots of the blocks that a model was trained in")


def told(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `dkv.load` that say what the files of a model do not."""
    return {name: getattr(args, name) for name in ("family", "mask_token_id", "attention_block")}


def model_facts(path_or_id: str, told: dict[str, Any]) -> dict[str, Any]:
    """What a model is, from its small files alone: no weight is read, or fetched from the hub."""
    import torch

    from dkv.core.kv_cache import head_bytes
    from dkv.models.counting import forms, held_bytes, read_bytes
    from dkv.models.folders import TOKENIZER_FILES, folder_of
    from dkv.models.loader import described
    from dkv.models.packing import int8_bytes
    from dkv.models.tokenizer import with_vocab_limit
    from dkv.models.transformer import Transformer

    folder = folder_of(path_or_id, TOKENIZER_FILES)
    kind, config = described(folder, **told)
    spec = with_vocab_limit(kind.spec(config), folder)
    held = forms(spec)
    plain = held["bfloat16"]
    of_weights = {"float32": 4 * plain.num_parameters} | {name: held_bytes(model) for name, model in held.items()}
    masked = isinstance(plain, Transformer)
    if masked:
        of_weights["int8_cpu"] = int8_bytes(plain)
    lengths = sorted({spec.max_positions, *(n for n in LENGTHS if n < spec.max_positions)})
    # Layers may be of several kinds, and say then what is of each.
    kinds = getattr(spec, "layers", [spec] * spec.num_layers)
    ways = {"float32": (torch.float32, "auto"), "bfloat16": (torch.bfloat16, "auto"), "int8": (torch.bfloat16, "int8")}
    slot = {
        name: 2 * sum(kind.num_kv_heads * head_bytes(kind.head_dim, *how) for kind in kinds)
        for name, how in ways.items()
    }
    in_half = {name: slot[name] for name in ("bfloat16", "int8")}
    reads = {name: read_bytes(model, COMPUTED) for name, model in held.items()} if masked else {}
    free = {name: {size: (size << 30) - of_weights[name] for size in DEVICES} for name in held}
    sums = {name: getattr(spec, name) for name in ("num_layers", "num_kv_heads", "head_dim", "eos_token_id")}
    return {
        "path": str(folder),
        "spec": {**asdict(spec), **sums},
        "parameters": plain.num_parameters,
        "weight_bytes": of_weights,
        "kv_bytes": {name: {n: size * n for n in lengths} for name, size in slot.items()},
        "step_bytes": {
            n: {
                name: {kept: [part + n * size for part in read] for kept, size in in_half.items()}
                for name, read in reads.items()
            }
            for n in (lengths if masked else ())
        },
        "slots_that_fit": {
            name: {
                kept: {device: max(left // size, 0) for device, left in room.items()} for kept, size in in_half.items()
            }
            for name, room in free.items()
        },
        "policies": policies_of(spec),
    }


def policies_of(spec: Any) -> dict[str, str | None]:
    """By policy, why it does not go with a model; None where it does."""
    from dkv.engine import canvas_settings, in_blocks
    from dkv.models.gemma_spec import GemmaSpec
    from dkv.policies import POLICIES

    found: dict[str, str | None] = {}
    for name, policy in POLICIES.items():
        found[name] = None
        if name != "none" and isinstance(spec, GemmaSpec):
            found[name] = canvas_settings.REFUSED["cache"]
            continue
        if spec.attention != "full" and not policy.in_blocks:
            found[name] = in_blocks.POLICIES_REFUSED[name]
            continue
        try:
            policy().check(spec.shifted)
        except ValueError as error:
            found[name] = str(error)
    return found


def described_model(facts: dict[str, Any]) -> str:
    """The facts of `model_facts` as text."""
    spec = facts["spec"]
    blocks = ""
    if spec["attention"] != "full":
        length = f"blocks of {spec['block_length']} slots" if spec["block_length"] else "blocks of a length not stated"
        blocks = f" ({length}, counted from {'the end of the prompt' if spec['blocks_from_prompt'] else 'slot 0'})"
    ids = {"mask": spec["mask_token_id"], "end": spec["eos_token_id"], "end of a turn": spec["eot_token_id"]}
    ids["padding"] = spec["pad_token_id"]
    lines = {
        "family": spec["family"],
        "folder": facts["path"],
        "attention": f"{PATTERNS[spec['attention']]}{blocks}",
        "outputs": "of the next slot" if spec["shifted"] else "of the slot itself",
        "sizes": (
            f"{spec['num_layers']} layers, hidden {spec['hidden_size']}, {spec['num_heads']} heads of "
            f"{spec['head_dim']} with {spec['num_kv_heads']} for keys and values, MLP {spec['intermediate_size']}, "
            f"vocabulary {spec['vocab_size']}, {spec['max_positions']} positions"
        ),
        "tokens": ", ".join(f"{name} {number}" for name, number in ids.items() if number is not None),
        "weights": f"{facts['parameters']:,} parameters: " + per_dtype(facts["weight_bytes"]),
    }
    if mixture := spec["mixture"]:
        shared = f", and a shared one of {mixture['shared_width']}" if mixture["shared_width"] else ""
        dense = f"; an MLP in {len(mixture['dense_layers'])} of the layers" if mixture["dense_layers"] else ""
        lines["experts"] = f"{mixture['chosen']} of {mixture['experts']}, of width {mixture['width']}{shared}{dense}"
    for length in facts["kv_bytes"]["float32"]:
        lines[f"K/V {length}"] = per_dtype({name: sizes[length] for name, sizes in facts["kv_bytes"].items()})
    out = [f"{name:10} {text}" for name, text in lines.items()]
    if facts["step_bytes"]:
        bounds = " (where all choose the same experts, to where each chooses others)" if mixture else ""
        heading = f"a cached step of batch 1 with {COMPUTED} slots computed reads{bounds}, by what model and K/V are in"
        out += ["", heading, *told_of_steps(facts["step_bytes"])]
    out += ["", "slots of K/V that fit beside the weights, by what they are in", *told_of_room(facts["slots_that_fit"])]
    out += ["", "policies"]
    return "\n".join([*out, *(f"  {name:14} {reason or 'applies'}" for name, reason in facts["policies"].items())])


def told_of_steps(steps: dict[int, dict[str, dict[str, list[int]]]]) -> list[str]:
    """What steps read over so many slots, and over what they read in bfloat16, as lines of a table."""

    def said(length: int, name: str, kept: str) -> str:
        found, whole = steps[length][name][kept], steps[length]["bfloat16"]["bfloat16"]
        amount = " to ".join(dict.fromkeys(map(amount_of, found)))
        over = " to ".join(dict.fromkeys(f"{size / most:.3f}" for size, most in zip(found, whole, strict=True)))
        return amount if found == whole else f"{amount} ({over}x)"

    return _table({f"{length:,} slots": partial(said, length) for length in steps}, next(iter(steps.values())))


def told_of_room(fits: dict[str, dict[str, dict[int, int]]]) -> list[str]:
    """How many slots fit where, as lines of a table."""

    def said(size: int, name: str, kept: str) -> str:
        return f"{fits[name][kept][size]:,}"

    return _table({f"{size} GiB": partial(said, size) for size in DEVICES}, fits)


def _table(cells: dict[str, Callable[[str, str], str]], kinds: dict[str, Any]) -> list[str]:
    """A line for each kind of weights and of keys and values in `kinds`."""
    from dkv.bench.report import columns

    rows = [(name, kept, *(cell(name, kept) for cell in cells.values())) for name in kinds for kept in kinds[name]]
    return [f"  {line}" for line in columns(("model", "K/V", *cells), rows, left=2).splitlines()]


def amount_of(size: int) -> str:
    """Bytes as text."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def per_dtype(sizes: dict[str, int]) -> str:
    """Bytes by dtype, as text."""
    return ", ".join(f"{amount_of(size)} in {name.replace('_cpu', ' on a CPU')}" for name, size in sizes.items())
