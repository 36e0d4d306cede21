"""`dkv audit` on our kernels and on kernels that are made to fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dkv.cli.audit import ARCHS
from dkv.kernels.common import backend

pytestmark = pytest.mark.skipif(not backend.has_triton(), reason="needs triton")
ROOT = Path(__file__).parents[3]

KERNELS = """
import os, signal
import triton
import triton.language as tl
from dkv.kernels.dev.cases import Case
from dkv.kernels.common.launch import Launch, LaunchTable


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0), mask=i < n)


@triton.jit
def multiply(x, y, n, BLOCK: tl.constexpr):
    m, k = tl.arange(0, BLOCK), tl.arange(0, 64)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in tl.range(0, n, 64):
        a = tl.load(x + m[:, None] * 4096 + first + k[None, :])
        b = tl.load(x + (first + k[:, None]) * 4096 + m[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(y + m[:, None] * BLOCK + m[None, :], acc.to(tl.bfloat16))


@triton.jit
def wrong(x, y, n, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, 3)))


class Deadly:
    __name__ = "deadly"

    @property
    def arg_names(self):
        os.kill(os.getpid(), signal.SIGKILL)


TABLE = LaunchTable("t", {"default": {1: Launch((128,), 4, 4)}, "sm_80": {1: Launch((128,), 8, 2)}})


def case(name, kernel, size, warps, *expect, stages=1, row=None):
    return Case(
        name, kernel, row or Launch((size,), warps, stages), {"x": "*bf16", "y": "*bf16", "n": "i32"},
        {"BLOCK": size}, ("x", "y", "n"), expect,
    )
"""

CASES = {
    "good": '[case("copy", copy, 1024, 4), case("multiply", multiply, 64, 4, "tensor core", "wgmma", "async copy", '
    "stages=3)]",
    # An AMD chip has twice the registers per lane.
    "tight": '[case("plain", multiply, 128, 8, stages=8), case("slow", copy, 1024, 4, "tensor core", "async copy"), '
    'case("spill", multiply, *((256, 4) if arch == "gfx942" else (128, 2)), "wgmma")]',
    "failing": '[case("error", wrong, 1024, 4), case("deadly", Deadly(), 1024, 4), case("types", copy, 1024, 4), '
    'Case("short", copy, Launch((1,), 4), {"x": "*bf16", "y": "*bf16"}, {"BLOCK": 16})]',
    "defaults": '[case("t", multiply, row.tile[0], 8, "wgmma", row=row) for _, row in TABLE.on(arch)]',
    "twice": '[case("copy", copy, 64, 4), case("copy", copy, 128, 4)]',
    "none": "[]",
}


@pytest.fixture
def audit(run, tmp_path, monkeypatch):
    """Run `dkv audit` on one list of cases: audit("good", "sm_90") -> (exit code, {case: row})."""
    (tmp_path / "auditable").mkdir()
    for name, listed in CASES.items():
        text = f"{KERNELS}\n\ndef audit_cases(arch):\n    return {listed}\n"
        (tmp_path / "auditable" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def call(name: str, *archs: str):
        code, out, err = run("audit", "--json", "--jobs", 1, "--op", f"auditable.{name}", "--arch", *archs)
        assert err == ""
        report = json.loads(out)
        assert len(report["rows"]) == report["broken"] + report["failed"] + sum(
            row.get("broken") == [] for row in report["rows"]
        )
        return code, {row["case"]: row for row in report["rows"]}

    return call


def test_our_kernels_pass(run, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, out, err = run("audit", "--quick", "--op", "rope_scatter", "commit")
    header, *lines, empty, summary = out.splitlines()
    assert (code, err, empty) == (0, "", "")
    assert header.split()[:2] == ["case", "arch"] and header.endswith("verdict")
    assert sorted(arch for line in lines for arch in ARCHS if f" {arch} " in line) == sorted(ARCHS * 2)
    assert all(line.endswith("  ok") for line in lines)
    assert summary.startswith("8 rows: 0 over budget, 0 that do not compile; triton ")


@pytest.mark.parametrize(
    ("arch", "tensor", "copies"),
    [
        ("sm_80", ["mma.sync"], ["cp.async"]), ("sm_90", ["wgmma"], ["cp.async"]),
        ("sm_100", ["tcgen05"], ["cp.async"]), ("gfx942", ["v_mfma"], []),
    ],
)  # fmt: skip
def test_instructions_of_an_architecture(audit, arch, tensor, copies):
    code, rows = audit("good", arch)
    assert code == 0
    assert rows["multiply"]["instructions"] == tensor + copies and rows["copy"]["instructions"] == []
    assert (rows["copy"]["warps"], rows["multiply"]["stages"]) == (4, 3)
    for row in rows.values():
        assert 0 < row["registers"] < 200 and 0 < row["occupancy"] <= 1 and row["stack"] == row["spills"] == 0
    assert rows["multiply"]["shared"] >= 2 * 64 * 64 * 2 > rows["copy"]["shared"]


def test_what_breaks_a_budget(audit):
    code, rows = audit("tight", "sm_90")
    assert code == 1
    # Eight stages of two tiles of 128 x 64 numbers.
    assert rows["plain"]["broken"] == ["256.0 KB of shared memory, 227 KB allowed"]
    assert rows["spill"]["stack"] > 0 and rows["spill"]["spills"] > 0
    assert [f"{rows['spill'][name]} bytes of {name}" for name in ("stack", "spills")] == rows["spill"]["broken"][:2]
    assert rows["slow"]["broken"] == ["no tensor core", "no async copy"]


def test_spills_on_amd(audit):
    code, rows = audit("tight", "gfx942")
    assert code == 1
    assert rows["spill"]["stack"] > 0 and rows["spill"]["spills"] > 0
    assert rows["slow"]["broken"] == ["no tensor core"]


def test_what_does_not_compile_is_told_and_the_rest_goes_on(audit):
    code, rows = audit("failing", "sm_80")
    assert code == 1
    assert list(rows) == ["error", "deadly", "types", "short"] and rows["types"]["broken"] == []
    assert "power of 2" in rows["error"]["error"] and "\n" not in rows["error"]["error"]
    assert rows["deadly"]["error"] == "the process died of SIGKILL"
    assert rows["short"]["error"] == "ValueError: arguments of copy without a type or value: n"


def test_failures_in_the_table(run, audit):
    code, out, _ = run("audit", "--op", "auditable.failing", "auditable.tight", "--arch", "sm_80", "--jobs", "2")
    lines = out.splitlines()
    assert code == 1 and "FAILED the process died of SIGKILL" in out
    assert "  BROKEN no tensor core, no async copy" in out
    assert lines[-1].startswith("7 rows: 3 over budget, 3 that do not compile; ")


def test_a_default_row_fits_every_chip(audit):
    """Also where the chip has a row of its own: then it need not be the best."""
    code, rows = audit("defaults", "sm_80")
    assert code == 1 and list(rows) == ["t", "t (default)"]
    assert rows["t"]["limit"] == 163 * 1024 and rows["t"]["broken"] == []
    assert rows["t (default)"]["broken"] == ["96.0 KB of shared memory, 64 KB allowed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_89"], "argument --arch: invalid choice: 'sm_89'"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--op", "matmul"], "unknown operation 'matmul'; known are attention, choose, "),
        (["--op", "no.such"], "unknown operation 'no.such'; known are "),
        (["--op", "auditable.none"], "there is nothing to compile"),
        (["--op", "auditable.twice"], "two cases of auditable.twice on sm_80 are named 'copy'"),
    ],
)
def test_wrong_arguments(run, audit, arguments, message):
    code, out, err = run("audit", *arguments)
    assert (code, out) == (2, "") and err.startswith(f"dkv audit: error: {message}")
    assert len(err.splitlines()) == 1


def test_without_triton(run, monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    message = "dkv audit: error: the package triton, which compiles the kernels, is not installed\n"
    assert run("audit") == (2, "", message)


def test_every_kernel_has_a_case():
    """Kernels are told by their names; in a process without the interpreter, which hides what they are."""
    code = (
        "import importlib\n"
        "from triton import JITFunction\n"
        "from dkv.kernels.dev import audit\n"
        "modules = [importlib.import_module(f'dkv.kernels.{name}.kernel') for name in audit.OPERATIONS]\n"
        "kernels = {x for m in modules for x in vars(m).values() if isinstance(x, JITFunction)}\n"
        "kernels = {x for x in kernels if x.__name__.endswith('_kernel')}\n"
        "for arch in audit.CHIPS:\n"
        "    cases = [case for m in audit.modules().values() for case, _ in audit.cases(m, arch).values()]\n"
        "    print(len(kernels), sorted(x.__name__ for x in kernels - {case.kernel for case in cases}))\n"
    )
    environment = {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    first, *others = done.stdout.splitlines()
    assert first.endswith(" []") and int(first.split()[0]) >= 5 and others == [first] * 3
