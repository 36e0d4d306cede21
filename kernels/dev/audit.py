"""Compile the kernels ahead of time, without a GPU, and hold what comes out against a budget.

The process that compiles must not have `TRITON_INTERPRET=1`, so `dkv audit` starts others:
`python -m dkv.kernels.dev.audit` reads one question a line and writes one answer a line.
"""

import contextlib
import importlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dkv.kernels.common.launch import LaunchTable
from dkv.kernels.dev.cases import Case

OPERATIONS = ("attention", "choose", "commit", "rope_scatter")
KB = 1024


@dataclass(frozen=True)
class Chip:
    """What a multiprocessor (AMD: compute unit) offers to the programs on it.

    Each is made of 4 parts (AMD: SIMDs), and each of those has 512 registers per lane, which a warp
    takes in units of 8: so on all four architectures.

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
CHIPS = MappingProxyType({
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 64, 32, 164 * KB, KB, 163 * KB),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 64, 32, 228 * KB, KB, 227 * KB),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 64, 32, 228 * KB, KB, 227 * KB),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 32, 32, 64 * KB, 0, 64 * KB),
})  # fmt: skip
PARTS, REGISTERS, REGISTER_UNIT = 4, 512, 8
TENSOR_COLUMNS = 512  # of sm_100, per multiprocessor
# A default launch runs on every chip, also on those that are not named above.
DEFAULT_LIMIT = 64 * KB

# Families of instructions, as they are found in PTX or in AMD assembly.
INSTRUCTIONS = MappingProxyType({
    "wgmma": re.compile(r"\bwgmma\.mma_async"),
    "tcgen05": re.compile(r"\btcgen05\.mma"),
    "mma.sync": re.compile(r"\bmma\.sync"),
    "v_mfma": re.compile(r"\bv_mfma"),
    "cp.async": re.compile(r"\bcp\.async\.c[ag]\b"),
    "cp.async.bulk": re.compile(r"\bcp\.async\.bulk\b"),
})  # fmt: skip
# What satisfies a `Case.expect`, and where it is asked for.
EXPECTED = MappingProxyType({
    "tensor core": (("wgmma", "tcgen05", "mma.sync", "v_mfma"), tuple(CHIPS)),
    "wgmma": (("wgmma",), ("sm_90",)),
    "async copy": (("cp.async", "cp.async.bulk"), ("sm_80", "sm_90", "sm_100")),
})  # fmt: skip


def modules(names: list[str] | None = None) -> dict[str, Any]:
    """The modules that have audit cases.

    Args:
        names: of operations, or import paths of other modules; default: all operations.

    Raises:
        ValueError: no such module, or it has no `audit_cases`.
    """
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
    """The cases of a module by name, each with the most shared memory that it may ask for.

    Raises:
        ValueError: two cases have one name.
    """
    tables = [x for x in vars(module).values() if isinstance(x, LaunchTable)]
    defaults = {id(launch) for table in tables for launch in table.entries["default"].values()}
    found: dict[str, tuple[Case, int]] = {}
    for case in module.audit_cases(arch):
        limit = CHIPS[arch].limit
        if id(case.launch) in defaults:
            limit = min(limit, DEFAULT_LIMIT)
            if case.name in found:
                # This chip has an entry of its own for the regime: of the default it matters only that it fits.
                case = replace(case, name=f"{case.name} (default)", expect=())
        if case.name in found:
            raise ValueError(f"two cases of {module.__name__} on {arch} are named {case.name!r}")
        found[case.name] = case, limit
    return found


def source(case: Case, arch: str) -> ASTSource:
    """The kernel with its types.

    Raises:
        ValueError: the arguments of the case are not those of the kernel.
    """
    names, kernel = case.kernel.arg_names, case.kernel.__name__
    given = [*case.arguments, *case.constants]
    if missing := {*names} - {*given}:
        raise ValueError(f"arguments of {kernel} without a type or value: {', '.join(sorted(missing))}")
    if extra := {*given, *case.aligned} - {*names}:
        raise ValueError(f"not arguments of {kernel}: {', '.join(sorted(extra))}")
    if twice := {*case.arguments} & {*case.constants}:
        raise ValueError(f"both arguments and constants of {kernel}: {', '.join(sorted(twice))}")
    attributes = {}
    for place, name in enumerate(names):
        known = [["tt.divisibility", 16]] if name in case.aligned else []
        # On AMD a launch tells the compiler which tensors are below 2 GiB.
        near = case.arguments.get(name, "").startswith("*") and name not in case.far
        if CHIPS[arch].target.backend == "hip" and near:
            known.append(["tt.pointer_range", 32])
        if known:
            attributes[place,] = known
    signature = {name: case.arguments.get(name, "constexpr") for name in names}
    return ASTSource(case.kernel, signature, dict(case.constants), attributes)


def facts(case: Case, arch: str) -> dict[str, Any]:
    """What the compiler makes of a case.

    Returns:
        registers, stack, spills (bytes per lane), shared (bytes), tensor_columns, instructions
        (families found) and occupancy (resident warps as a share of the most there can be).
    """
    log, knobs = io.StringIO(), triton.knobs
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        # A cached result comes without the report of ptxas.
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        options = {"num_warps": case.launch.warps, "num_stages": case.launch.stages}
        compiled = triton.compile(source(case, arch), target=CHIPS[arch].target, options=options)
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
    return {
        "registers": registers, "stack": stack, "spills": spills, "shared": shared, "tensor_columns": columns,
        "instructions": [name for name, pattern in INSTRUCTIONS.items() if pattern.search(text)],
        "occupancy": occupancy(CHIPS[arch], registers, case.launch.warps, shared, columns),
    }  # fmt: skip


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
        if found[name] and not case.rare:
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


def entry(module: Any, arch: str, name: str) -> dict[str, Any]:
    """One line of the report; a failure to compile is told in it, not raised."""
    case, limit = cases(module, arch)[name]
    line = {"case": name, "arch": arch, "warps": case.launch.warps, "stages": case.launch.stages, "limit": limit}
    began = time.monotonic()
    try:
        found = facts(case, arch)
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


def listed(names: list[str] | None, archs: list[str]) -> list[dict[str, Any]]:
    """Every case of some modules on some architectures, with what tells how much it asks for."""
    return [
        {"op": op, "arch": arch, "name": name, "weight": [len(case.expect), len(case.arguments)]}
        for op, module in modules(names).items() for arch in archs for name, (case, _) in cases(module, arch).items()
    ]  # fmt: skip


def answers(questions: Iterator[str]) -> Iterator[str]:
    """A JSON answer for every JSON question: {"ops", "archs"}, or {"op", "arch", "name"}."""
    for line in questions:
        question = json.loads(line)
        try:
            if "name" in question:
                (module,) = modules([question["op"]]).values()
                yield json.dumps(entry(module, question["arch"], question["name"]))
            else:
                yield json.dumps(listed(question["ops"], question["archs"]))
        except Exception as error:
            yield json.dumps({"error": str(error) if isinstance(error, ValueError) else first_line(error)})


if __name__ == "__main__":
    # Compilers print: what they print must not come between the answers.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as channel:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for answer in answers(iter(sys.stdin.readline, "")):
            print(answer, file=channel, flush=True)
