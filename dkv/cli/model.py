"""What is said of a model beside its files, and what `dkv info MODEL` says of one."""

import argparse
from dataclasses import asdict
from typing import Any

# Slots of a row at which the memory of keys and values is told, besides the most that a model takes.
LENGTHS = (1024, 4096, 16384)
# Memory of devices, in GiB, of which it is told how many slots fit.
DEVICES = (8, 16, 24, 48, 80)
PATTERNS = {
    "full": "every slot sees all",
    "block": "a slot sees its block and all before it",
    "prefix_causal": "a slot sees its block while it is filled, and before it as a causal model",
}


def add_weights(add: Any) -> None:
    """The options that `weights` reads."""
    add("--dtype", help="auto, float32, bfloat16, float16 or float64 (default: auto, on a CPU at least float32)")
    bytes_ = "int8: weights of products as bytes, on a CPU with VNNI: docs/devices.md (default: those of the dtype)"
    add("--weights", metavar="KIND", help=bytes_)


def weights(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `dkv.load` that say how weights are held."""
    return {"dtype": args.dtype, "weights": args.weights}


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
    from dkv.models.folders import TOKENIZER_FILES, folder_of
    from dkv.models.loader import described
    from dkv.models.packing import int8_bytes
    from dkv.models.skeleton import NETWORKS
    from dkv.models.tokenizer import with_vocab_limit
    from dkv.models.transformer import Transformer

    folder = folder_of(path_or_id, TOKENIZER_FILES)
    kind, config = described(folder, **told)
    spec = with_vocab_limit(kind.spec(config), folder)
    sizes = {"float32": 4, "bfloat16": 2}
    with torch.device("meta"):
        model = NETWORKS[type(spec)](spec)
    parameters = model.num_parameters
    of_weights = {name: size * parameters for name, size in sizes.items()}
    if isinstance(model, Transformer):
        of_weights["int8"] = int8_bytes(model)
    lengths = sorted({spec.max_positions, *(n for n in LENGTHS if n < spec.max_positions)})
    # Layers may be of several kinds, and say then what is of each.
    kinds = getattr(spec, "layers", [spec] * spec.num_layers)
    ways = {"float32": (torch.float32, "auto"), "bfloat16": (torch.bfloat16, "auto"), "int8": (torch.bfloat16, "int8")}
    slot = {
        name: 2 * sum(kind.num_kv_heads * head_bytes(kind.head_dim, *how) for kind in kinds)
        for name, how in ways.items()
    }
    # Beside weights in half precision.
    free = {size: (size << 30) - sizes["bfloat16"] * parameters for size in DEVICES}
    sums = {name: getattr(spec, name) for name in ("num_layers", "num_kv_heads", "head_dim", "eos_token_id")}
    return {
        "path": str(folder),
        "spec": {**asdict(spec), **sums},
        "parameters": parameters,
        "weight_bytes": of_weights,
        "kv_bytes": {name: {n: size * n for n in lengths} for name, size in slot.items()},
        "slots_that_fit": {
            name: {size: max(left // slot[name], 0) for size, left in free.items()} for name in ("bfloat16", "int8")
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
    for size, slots in facts["slots_that_fit"]["bfloat16"].items():
        more = facts["slots_that_fit"]["int8"][size]
        room = f"beside the weights in bfloat16 room for {slots:,} slots of K/V in bfloat16, {more:,} in int8"
        lines[f"in {size} GiB"] = room if more else "the weights in bfloat16 do not fit"
    out = [f"{name:10} {text}" for name, text in lines.items()]
    out += ["", "policies"]
    return "\n".join([*out, *(f"  {name:14} {reason or 'applies'}" for name, reason in facts["policies"].items())])


def per_dtype(sizes: dict[str, int]) -> str:
    """Bytes by dtype, as text."""
    return ", ".join(
        f"{size / 2**30:.2f} GiB in {name}" if size >= 2**30 else f"{size / 2**20:.2f} MiB in {name}"
        for name, size in sizes.items()
    )
