"""`dkv info`: what is installed and what it would run on, or what a model is."""

import argparse
import json
import os
import platform
from dataclasses import fields
from typing import Any

from dkv.cli.model import add_told, described_model, model_facts, told

SUMMARY = "Tell versions, devices, backends, bundled models and cache policies; or what a model is and needs."

EXAMPLES = """\
examples:
  dkv info
  dkv info --json                  the same for a program; paste either into a report of a fault
  dkv info tiny-dream              family, sizes, memory and policies of a model: also of a folder, or of one on the
                                   hub by its id (org/name), whose weights are not fetched
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a bundled name, a checkpoint folder or a hub id")
    add_told(parser.add_argument)
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    if args.model is not None:
        found = model_facts(args.model, told(args))
        print(json.dumps(found) if args.json else described_model(found))
        return 0
    if given := [name for name, value in told(args).items() if value is not None]:
        raise ValueError(f"--{given[0].replace('_', '-')} goes with a MODEL, of which it tells")
    print_machine(args)
    return 0


def print_machine(args: argparse.Namespace) -> None:
    """What is installed, as text or as JSON."""
    from dkv.models.folders import BUNDLED
    from dkv.policies import POLICIES
    from dkv.version import versions

    found = devices()
    facts = {
        "versions": versions(),
        "devices": found,
        "backends": backends(list(found)),
        "models": {name: {"path": str(p), "present": (p / "config.json").is_file()} for name, p in BUNDLED.items()},
        "policies": {name: {f.name: f.default for f in fields(policy)} for name, policy in POLICIES.items()},
    }
    print(json.dumps(facts) if args.json else described(facts))


def devices() -> dict[str, dict[str, Any]]:
    """The CPU and every CUDA or ROCm device, by their names in torch."""
    import torch

    cpu = {"name": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    found: dict[str, dict[str, Any]] = {"cpu": {**cpu, "torch_threads": torch.get_num_threads()}}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        found[f"cuda:{index}"] = {"name": card.name, "memory_gib": round(card.total_memory / 2**30, 1), "kind": kind}
    return found


def backends(names: list[str]) -> dict[str, Any]:
    """Which implementation of the operations runs on every device, who chose it, and which there are."""
    import torch

    from dkv.kernels.common.backend import BACKENDS, chosen, default, has_triton, interpreted

    known = dict(BACKENDS)
    if not has_triton():
        known["triton"] = "not installed: pip install triton"
    choice = chosen()
    used: dict[str, str | None] = {name: choice or default(torch.device(name)) for name in names}
    if used["cpu"] == "triton" and not interpreted():
        used["cpu"] = None  # its tensors would be refused
    return {"chosen": choice, "used": used, "triton_installed": has_triton(), "known": known}


def described(facts: dict[str, Any]) -> str:
    """The facts as text."""
    backends = facts["backends"]
    lines = [", ".join(f"{name} {version}" for name, version in facts["versions"].items())]
    lines += ["", "devices"]
    for name, device in facts["devices"].items():
        if "cores" in device:
            detail = f"cores: {device['cores']}, threads of torch: {device['torch_threads']}"
        else:
            detail = f"{device['memory_gib']} GiB, {device['kind']}"
        used = backends["used"][name] or "none (Triton runs there with TRITON_INTERPRET=1 alone)"
        lines.append(f"  {name:10} {device['name']}, {detail}, backend: {used}")
    by = f"chosen by DKV_BACKEND: {backends['chosen']}" if backends["chosen"] else "chosen by the device"
    lines += ["", f"backends ({by}; DKV_BACKEND or dkv.use_backend choose another)"]
    lines += [f"  {name:10} {says}" for name, says in backends["known"].items()]
    lines += ["", "models"]
    for name, model in facts["models"].items():
        lines.append(f"  {name:10} {model['path']}{'' if model['present'] else ' (missing)'}")
    lines += ["", "policies (dkv generate --cache NAME) and the defaults of their options"]
    for name, options in facts["policies"].items():
        lines.append(f"  {name:10} {' '.join(f'{option}={value}' for option, value in options.items())}".rstrip())
    return "\n".join(lines)
