"""`dkv audit` on our kernels and on kernels that are made to fail."""

import importlib
import json

import pytest

from dkv.cli.audit import ARCHS, table
from dkv.kernels.common import backend

pytest.importorskip("triton")

from dkv.kernels.dev import audit

KERNELS = """
import os, signal
import triton
import triton.language as tl
from dkv.kernels.common.launch import Call, Launch, LaunchTable
from dkv.kernels.dev.cases import Case, meta


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


def case(name, kernel, size, warps, *expect, stages=1, launch=None):
    arguments = {"x": meta(4096, 4096), "y": meta(4096), "n": 4096, "BLOCK": size}
    return Case(name, Call(kernel, (1,), launch or Launch((size,), warps, stages), arguments), expect)
"""

CASES = {
    "good": '[case("copy", copy, 1024, 4), case("multiply", multiply, 64, 4, "tensor core", "wgmma", "async copy", '
    "stages=3)]",
    # An AMD chip has twice the registers per lane.
    "tight": '[case("plain", multiply, 128, 8, stages=8), case("slow", copy, 1024, 4, "tensor core", "async copy"), '
    'case("spill", multiply, *((256, 4) if arch == "gfx942" else (128, 2)), "wgmma")]',
    "failing": '[case("error", wrong, 1024, 4), case("deadly", Deadly(), 1024, 4), case("types", copy, 1024, 4), '
    'Case("short", Call(copy, (1,), Launch((1,), 4), {"x": meta(16), "y": meta(16), "BLOCK": 16}))]',
    "defaults": '[case("t", multiply, launch.tile[0], 8, "wgmma", launch=launch) for _, launch in TABLE.on(arch)]',
    "twice": '[case("copy", copy, 64, 4), case("copy", copy, 128, 4)]',
    "none": "[]",
}


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """The lists of cases are on the path of the process that compiles."""
    (tmp_path / "auditable").mkdir()
    for name, content in CASES.items():
        text = f"{KERNELS}\n\ndef audit_cases(arch):\n    return {content}\n"
        (tmp_path / "auditable" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def report_of(run, listed):
    """Run `dkv audit` on one list of cases: report_of("good", "sm_90") -> (exit code, {(case, arch): line})."""

    def call(name: str, *archs: str):
        code, out, err = run("audit", "--json", "--op", f"auditable.{name}", "--arch", *archs)
        assert err == ""
        report = json.loads(out)
        passed = sum(line.get("broken") == [] for line in report["rows"])
        assert len(report["rows"]) == report["broken"] + report["failed"] + passed
        return code, {(line["case"], line["arch"]): line for line in report["rows"]}

    return call


def test_our_kernels_pass(run, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, out, err = run("audit", "--quick", "--op", "rope_scatter", "commit", "--arch", "sm_90", "gfx942")
    header, *lines, empty, summary = out.splitlines()
    assert (code, err, empty) == (0, "", "")
    assert header.split()[:2] == ["case", "arch"] and header.endswith("verdict")
    assert sorted(arch for line in lines for arch in ARCHS if f" {arch} " in line) == ["gfx942"] * 2 + ["sm_90"] * 2
    assert all(line.endswith("  ok") for line in lines)
    assert summary.startswith("4 kernels: 0 over budget, 0 that do not compile; triton ")


def test_instructions_of_the_architectures(report_of):
    expected = {arch: ["mma.sync", "cp.async"] for arch in ("sm_80", "sm_86", "sm_89", "sm_120")}
    expected |= {"sm_90": ["wgmma", "cp.async"], "sm_100": ["tcgen05", "cp.async"]}
    code, lines = report_of("good", *ARCHS)
    assert code == 0
    for arch, instructions in (expected | {"gfx942": ["v_mfma"]}).items():
        copy, multiply = lines["copy", arch], lines["multiply", arch]
        assert multiply["instructions"] == instructions and copy["instructions"] == []
        assert (copy["warps"], multiply["stages"]) == (4, 3)
        for line in (copy, multiply):
            assert 0 < line["registers"] < 200 and 0 < line["occupancy"] <= 1 and line["stack"] == line["spills"] == 0
        assert multiply["shared"] >= 2 * 64 * 64 * 2 > copy["shared"]


@pytest.mark.parametrize(
    ("arch", "missing"),
    [
        ("sm_90", ["no tensor core", "no async copy"]),
        pytest.param("gfx942", ["no tensor core"], marks=pytest.mark.slow),
    ],
)
def test_what_breaks_a_budget(report_of, arch, missing):
    code, lines = report_of("tight", arch)
    assert code == 1
    if arch == "sm_90":  # eight stages of two tiles of 128 x 64 numbers
        assert lines["plain", arch]["broken"] == ["256.0 KB of shared memory, 227 KB allowed"]
    spill = lines["spill", arch]
    assert spill["stack"] > 0 and spill["spills"] > 0
    assert [f"{spill[name]} bytes of {name}" for name in ("stack", "spills")] == spill["broken"][:2]
    assert lines["slow", arch]["broken"] == missing


def test_what_does_not_compile_is_told_and_the_rest_goes_on(run, listed):
    """A default entry fits every chip, also where the chip has an entry of its own: then it need not be the best."""
    code, out, _ = run("audit", "--json", "--op", "auditable.failing", "auditable.defaults", "--arch", "sm_80")
    report = json.loads(out)
    lines = {line["case"]: line for line in report["rows"]}
    assert (code, report["broken"], report["failed"]) == (1, 1, 3)
    assert list(lines) == ["error", "deadly", "types", "short", "t", "t (default)"] and lines["types"]["broken"] == []
    assert "power of 2" in lines["error"]["error"] and "\n" not in lines["error"]["error"]
    assert lines["deadly"]["error"] == "the process died of SIGKILL"
    assert lines["short"]["error"] == "ValueError: arguments of copy without a value: n"
    assert lines["t"]["limit"] == 163 * 1024 and lines["t"]["broken"] == []
    assert lines["t (default)"]["broken"] == ["96.0 KB of shared memory, 64 KB allowed"]
    text = table(report["rows"])
    assert "  FAILED the process died of SIGKILL\n" in text
    assert text.endswith("  BROKEN 96.0 KB of shared memory, 64 KB allowed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_75"], "argument --arch: invalid choice: 'sm_75'"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--op", "matmul"], "unknown operation 'matmul'; known are attention, change, "),
    ],
)
def test_wrong_arguments(run, arguments, message):
    code, out, err = run("audit", *arguments)
    assert (code, out) == (2, "") and err.startswith(f"dkv audit: error: {message}")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.such", "unknown operation 'no.such'; known are "),
        ("auditable.none", "there is nothing to compile"),
        ("auditable.twice", "two cases of auditable.twice on sm_80 are named 'copy'"),
    ],
)
def test_wrong_cases(listed, name, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        audit.listed([name], ["sm_80"], quick=False)


def test_without_triton(run, monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    message = "dkv audit: error: the package triton, which compiles the kernels, is not installed\n"
    assert run("audit") == (2, "", message)


def test_every_kernel_has_a_case():
    """Kernels are told by their names."""
    found = [vars(importlib.import_module(f"dkv.kernels.{name}.kernel")) for name in audit.OPERATIONS]
    kernels = {x for names in found for name, x in names.items() if name.endswith("_kernel")}
    assert len(kernels) >= 5
    for arch in ARCHS:
        listed = [case for module in audit.modules().values() for case, _ in audit.cases(module, arch).values()]
        assert kernels == {case.call.kernel for case in listed}
