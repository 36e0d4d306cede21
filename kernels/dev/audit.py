"""Compile the kernels ahead of time, without a GPU, and hold what comes out against a budget.

The process that compiles must not have `TRITON_INTERPRET=1`, so `dkv audit` starts another: `python -m
dkv.kernels.dev.audit`.
"""

import contextlib
import importlib
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dkv.kernels.common.launch import Call, LaunchTable, entries_of
from dkv.kernels.dev.cases import Case, described

OPERATIONS = ("attention", "change", "choose", "commit", "gate", "linear", "mass", "norm", "plan", "rope_scatter")
KB = 1024


@dataclass(frozen=True)
class Chip:
    """What a multiprocessor (AMD: compute unit) offers to the programs on it.

    Each is made of 4 parts (AMD: SIMDs), and each of those has 512 registers per lane, which a warp
    takes in units of 8: so on all of these architectures.

    Attributes:
        warps: the most resident warps (AMD: waves).
        programs: the most resident programs.
        shared: bytes of shared memory (AMD: LDS).
        reserved: bytes of it that the system takes from every program.
        limit: the most bytes of it that one program may ask for.
    """

    target: GPUTarget
    warps: int
    programs: int
    shared: int
    reserved: int
    limit: int


# NVIDIA: CUDA C++ Programming Guide, technical specifications per compute capability.
# AMD: CDNA 3 instruction set reference, and LLVM's user guide of the AMDGPU backend.
CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 64, 32, 164 * KB, KB, 163 * KB),
    "sm_86": Chip(GPUTarget("cuda", 86, 32), 48, 16, 100 * KB, KB, 99 * KB),
    "sm_89": Chip(GPUTarget("cuda", 89, 32), 48, 24, 100 * KB, KB, 99 * KB),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 64, 32, 228 * KB, KB, 227 * KB),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 64, 32, 228 * KB, KB, 227 * KB),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 48, 24, 100 * KB, KB, 99 * KB),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 32, 32, 64 * KB, 0, 64 * KB),
}
PARTS, REGISTERS, REGISTER_UNIT = 4, 512, 8
TENSOR_COLUMNS = 512  # of sm_100, per multiprocessor
# A default launch runs on every chip, also on those that are not named above.
DEFAULT_LIMIT = 64 * KB

# Families of instructions, as they are found in PTX or in AMD assembly.
INSTRUCTIONS = {
    "wgmma": re.compile(r"\bwgmma\.mma_async"),
    "tcgen05": re.compile(r"\btcgen05\.mma"),
    "mma.sync": re.compile(r"\bmma\.sync"),
    "v_mfma": re.compile(r"\bv_mfma"),
    "cp.async": re.compile(r"\bcp\.async\.c[ag]\b"),
    "cp.async.bulk": re.compile(r"\bcp\.async\.bulk\b"),
}
# What satisfies a `Case.expect`, and where it is asked for.
EXPECTED = {
    "tensor core": (("wgmma", "tcgen05", "mma.sync", "v_mfma"), tuple(CHIPS)),
    "wgmma": (("wgmma",), ("sm_90",)),
    "async copy": (("cp.async", "cp.async.bulk"), tuple(arch for arch in CHIPS if arch != "gfx942")),
}


def modules(names: list[str] | None = None) -> dict[str, Any]:
    """The modules that have audit cases: of operations (default: of all), or other modules by their import paths."""
    found = {}
    for name in dict.fromkeys(OPERATIONS if names is None else names):
        module = None
        with contextlib.suppress(ModuleNotFoundError):
            module = importlib.import_module(f"dkv.kernels.{name}.triton" if name in OPERATIONS else name)
        if not hasattr(module, "audit_cases"):
            raise ValueError(f"unknown operation {name!r}; known are {', '.join(OPERATIONS)}")
        found[name] = module
    return found


def cases(module: Any, arch: str) -> dict[str, tuple[Case, int]]:
    """The cases of a module by name, each with the most shared memory that it may ask for."""
    tables = [x for x in vars(module).values() if isinstance(x, LaunchTable)]
    defaults = {id(launch) for table in tables for launch in table.entries["default"].values()}
    found: dict[str, tuple[Case, int]] = {}
    for case in module.audit_cases(entries_of(arch)):
        limit = CHIPS[arch].limit
        if id(case.call.launch) in defaults:
            limit = min(limit, DEFAULT_LIMIT)
            if case.name in found:
                # This chip has an entry of its own for the regime: of the default it matters only that it fits.
                case = replace(case, name=f"{case.name} (default)", expect=())
        if case.name in found:
            raise ValueError(f"two cases of {module.__name__} on {arch} are named {case.name!r}")
        found[case.name] = case, limit
    return found


def source(call: Call, arch: str) -> ASTSource:
    """The kernel with its types; refused if the arguments of the call are not those of the kernel."""
    places = {name: place for place, name in enumerate(call.kernel.arg_names)}
    if missing := {*places} - {*call.arguments}:
        raise ValueError(f"arguments of {call.kernel.__name__} without a value: {', '.join(sorted(missing))}")
    if extra := {*call.arguments} - {*places}:
        raise ValueError(f"not arguments of {call.kernel.__name__}: {', '.join(sorted(extra))}")
    known = described(call)
    attributes = {path: [["tt.divisibility", 16]] for path in known.aligned}
    if CHIPS[arch].target.backend == "hip":  # where a launch tells the compiler which tensors are below 2 GiB
        for path in known.near:
            attributes[path] = [*attributes.get(path, []), ["tt.pointer_range", 32]]
    constants, attributes = (
        {(places[name], *rest): x for (name, *rest), x in found.items()} for found in (known.constants, attributes)
    )
    return ASTSource(call.kernel, {name: known.types[name] for name in places}, constants, attributes)


def facts(call: Call, arch: str) -> dict[str, Any]:
    """What the compiler makes of a call: stack and spills are bytes per lane, shared is bytes."""
    log, knobs = io.StringIO(), triton.knobs
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        # A cached result comes without the report of ptxas.
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        options = {"num_warps": call.launch.warps, "num_stages": call.launch.stages}
        compiled = triton.compile(source(call, arch), target=CHIPS[arch].target, options=options)
    if "ptx" in compiled.asm:
        text, report = compiled.asm["ptx"], log.getvalue()
        registers = most(r"Used (\d+) registers", report)
        stack = most(r"(\d+) bytes stack frame", report)
        spills = max(most(rf"(\d+) bytes spill {kind}", report) for kind in ("stores", "loads"))
    else:
        text = compiled.asm["amdgcn"]
        registers = most(r"\.vgpr_count:\s+(\d+)", text)  # accumulation registers are among them
        stack = most(r"\.private_segment_fixed_size:\s+(\d+)", text)
        spills = 4 * most(r"\.vgpr_spill_count:\s+(\d+)", text)
    shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    found = {"registers": registers, "stack": stack, "spills": spills, "shared": shared, "tensor_columns": columns}
    found["instructions"] = [name for name, pattern in INSTRUCTIONS.items() if pattern.search(text)]
    return found | {"occupancy": occupancy(CHIPS[arch], registers, call.launch.warps, shared, columns)}


def most(pattern: str, report: str) -> int:
    """The largest number that a report gives for something."""
    found = [int(number) for number in re.findall(pattern, report)]
    if not found:
        raise RuntimeError(f"the compiler's report has no {pattern!r}")
    return max(found)


def occupancy(chip: Chip, registers: int, warps: int, shared: int, columns: int = 0) -> float:
    """Resident warps of a multiprocessor, as a share of the most there can be."""
    units = -(-max(registers, 1) // REGISTER_UNIT)
    resident = PARTS * min(chip.warps // PARTS, REGISTERS // (units * REGISTER_UNIT))
    programs = min(chip.programs, resident // warps)
    if shared + chip.reserved:
        programs = min(programs, chip.shared // (shared + chip.reserved))
    if columns:
        programs = min(programs, TENSOR_COLUMNS // columns)
    return programs * warps / chip.warps


def broken(case: Case, arch: str, limit: int, found: Mapping[str, Any]) -> list[str]:
    """In what a case is over budget, in words."""
    wrong = []
    for name in ("stack", "spills"):
        if found[name] and not case.call.rare:
            wrong.append(f"{found[name]} bytes of {name}")
    if found["shared"] > limit:
        wrong.append(f"{found['shared'] / KB:.1f} KB of shared memory, {limit // KB} KB allowed")
    if found["tensor_columns"] > TENSOR_COLUMNS:
        wrong.append(f"{found['tensor_columns']} columns of tensor memory, {TENSOR_COLUMNS} allowed")
    for family in case.expect:
        names, archs = EXPECTED[family]
        if arch in archs and not {*names} & {*found["instructions"]}:
            wrong.append(f"no {family}")
    return wrong


def compiled(case: Case, arch: str, limit: int) -> dict[str, Any]:
    """What is told of a case; a failure to compile is told too, not raised."""
    launch, began = case.call.launch, time.monotonic()
    line = {"warps": launch.warps, "stages": launch.stages, "limit": limit}
    try:
        found = facts(case.call, arch)
        found["broken"] = broken(case, arch, limit, found)
    except Exception as error:
        found = {"error": first_line(error)}
    return line | found | {"seconds": round(time.monotonic() - began, 2)}


def first_line(error: Exception) -> str:
    """What an error says first, and its kind; Triton's come after the lines of the kernel they are about."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = getattr(error, "error_message", None) or str(error)
    said = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}".removesuffix(": ")


def listed(ops: list[str] | None, archs: list[str], quick: bool) -> list[tuple[str, str, Case, int]]:
    """Operation, architecture, case and limit of shared memory; if quick, the case of each that asks most."""
    found = [
        (op, arch, case, limit)
        for op, module in modules(ops).items()
        for arch in archs
        for case, limit in cases(module, arch).values()
    ]
    if quick:
        found = list({x[:2]: x for x in sorted(found, key=lambda x: weight(x[2]))}.values())
    if not found:
        raise ValueError("there is nothing to compile")
    return found


def weight(case: Case) -> tuple[int, int]:
    """How much is asked of the compiler: instructions, and arguments, those in tuples too."""
    return len(case.expect), sum(x is not None for x in tree_leaves(case.call.arguments))


def results(todo: list[tuple[str, str, Case, int]], jobs: int, folder: Path) -> Iterator[dict[str, Any]]:
    """What became of every case, as they are done. Each is compiled in a fork of this process: a compiler may die."""
    waiting, running = dict(enumerate(todo)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            place = next(iter(waiting))
            op, arch, case, limit = waiting.pop(place)
            if (pid := os.fork()) == 0:
                try:
                    (folder / str(place)).write_text(json.dumps(compiled(case, arch, limit)))
                    os._exit(0)
                finally:
                    os._exit(1)
            running[pid] = {"place": place, "op": op, "case": case.name, "arch": arch}
        pid, status = os.wait()
        line = running.pop(pid)
        if code := os.waitstatus_to_exitcode(status):
            how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            yield line | {"error": f"the process {how}"}
        else:
            yield line | json.loads((folder / str(line["place"])).read_text())


def answers(question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """How many cases a question asks for, and then each of them; or why there are none."""
    try:
        todo = listed(question["ops"], question["archs"], question["quick"])
    except Exception as error:
        yield {"error": str(error) if isinstance(error, ValueError) else first_line(error)}
        return
    yield {"cases": len(todo)}
    yield from results(todo, question["jobs"], Path(question["folder"]))


if __name__ == "__main__":
    # Compilers print: what they print must not come between the answers.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as channel:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for answer in answers(json.loads(sys.stdin.read())):
            print(json.dumps(answer), file=channel, flush=True)
