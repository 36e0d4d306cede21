"""Launch tables, the search of DKV_AUTOTUNE=1, and the arithmetic of an audit."""

import importlib

import pytest
import torch

pytest.importorskip("triton")

from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from dkv.kernels.common import launch
from dkv.kernels.common.launch import Call, Launch, LaunchTable
from dkv.kernels.dev import audit
from dkv.kernels.dev.autotune import search
from dkv.kernels.dev.cases import Case

SMALL, MIDDLE, LARGE, HUGE = Launch((16, 32), 4), Launch((64, 64), 4, 2), Launch((128, 64), 8, 3), Launch((512, 512), 8)
FEW, MANY = ("few", 2), ("many", 2)
TABLES = {
    table.name: table
    for operation in audit.OPERATIONS
    for table in vars(importlib.import_module(f"dkv.kernels.{operation}.triton")).values()
    if isinstance(table, LaunchTable)
}


def made(*candidates: Launch) -> LaunchTable:
    return LaunchTable("op", {"default": {FEW: SMALL, MANY: MIDDLE}, "sm_90": {MANY: LARGE}}, candidates)


def timer_of(times: dict[Launch, float]):
    """A run that notes its launch, and a timer that looks up what that takes."""
    ran = []

    def timer(call) -> float:
        call()
        if isinstance(times[ran[-1]], Exception):
            raise times[ran[-1]]
        return times[ran[-1]]

    return ran, timer


def test_entries_of_an_architecture():
    table = made()
    assert (
        table.launch("sm_90", MANY) == LARGE
        and table.launch("sm_90", FEW) == SMALL
        and table.launch("sm_80", MANY) == MIDDLE
    )
    with pytest.raises(KeyError):
        table.launch("sm_90", "none")
    assert list(table.on("sm_80")) == [(FEW, SMALL), (MANY, MIDDLE)]
    # The default too: some other chip runs it.
    assert list(table.on("sm_90")) == [(FEW, SMALL), (MANY, LARGE), (MANY, MIDDLE)]


def test_tables_are_frozen():
    table = made()
    for change in (table.entries, table.entries["default"]):
        with pytest.raises(TypeError):
            change["x"] = SMALL
    with pytest.raises(AttributeError):
        SMALL.warps = 8


def test_there_are_tables():
    assert len(TABLES) >= 4


@pytest.mark.parametrize("name", TABLES)
def test_shipped_tables(name):
    table = TABLES[name]
    assert set(table.entries) <= {"default", "interpreter", *audit.CHIPS}
    rows = [row for rows in table.entries.values() for row in rows.values()]
    for rows_of_arch in table.entries.values():
        assert set(rows_of_arch) <= set(table.entries["default"])  # or it would never run
    for row in (*rows, *table.candidates):
        assert row.warps in (1, 2, 4, 8, 16) and row.stages >= 1
        assert all(size > 0 and size & (size - 1) == 0 for size in row.tile)
    assert len({len(row.tile) for row in (*rows, *table.candidates)}) == 1


def test_every_architecture_of_the_audit_has_entries():
    named = {arch for table in TABLES.values() for arch in table.entries}
    assert {launch.entries_of(arch) for arch in audit.CHIPS} == named - {"default", "interpreter"}
    assert launch.entries_of("sm_89") == "sm_86" and launch.entries_of("sm_42") == "sm_42"


def test_search_returns_and_prints_the_fastest(capsys):
    ran, timer = timer_of({LARGE: 2.0, SMALL: 3.0, MIDDLE: 1.5})
    assert search(made(SMALL, LARGE, MIDDLE), "sm_90", MANY, ran.append, timer) == MIDDLE
    assert ran == [LARGE, SMALL, MIDDLE]  # the present entry first, each once
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        'op on sm_90, ("many", 2): 3 entries timed, 0 do not run\n'
        "     1.5000 ms  Launch((64, 64), 4, 2)\n"
        "     2.0000 ms  Launch((128, 64), 8, 3)  the present entry\n"
        "     3.0000 ms  Launch((16, 32), 4)\n"
        '"sm_90": {("many", 2): Launch((64, 64), 4, 2)},\n'
    )
    assert eval("{" + err.splitlines()[-1] + "}") == {"sm_90": {MANY: MIDDLE}}


def test_search_keeps_the_present_row_if_another_is_no_faster():
    ran, timer = timer_of({LARGE: 1.0, SMALL: 1.0})
    assert search(made(SMALL), "sm_90", MANY, ran.append, timer) == LARGE


@pytest.mark.parametrize("error", [OutOfResources(300_000, 232_448, "shared memory"), RuntimeError("PassManager::run")])
def test_search_leaves_out_what_does_not_run(capsys, error):
    ran, timer = timer_of({LARGE: 1.0, HUGE: error, SMALL: 2.0})
    assert search(made(HUGE, SMALL), "sm_90", MANY, ran.append, timer) == LARGE
    assert "2 entries timed, 1 do not run" in capsys.readouterr().err


def test_search_when_nothing_runs():
    ran, timer = timer_of({LARGE: OutOfResources(2, 1, "registers"), HUGE: RuntimeError("another")})
    with pytest.raises(TritonError, match="registers"):
        search(made(HUGE), "sm_90", MANY, ran.append, timer)


@pytest.mark.parametrize("kind", [ValueError, getattr(torch, "AcceleratorError", KeyError)])
def test_search_stops_at_other_errors(kind):
    ran, timer = timer_of({LARGE: 1.0, HUGE: kind.__new__(kind)})
    with pytest.raises(kind):
        search(made(HUGE), "sm_90", MANY, ran.append, timer)


@pytest.fixture
def gpu(monkeypatch):
    """A process that takes itself to be on an H100, and how often a search was made."""
    searched = []

    def fake(table, arch, regime, run):
        searched.append((arch, regime))
        return MIDDLE

    monkeypatch.setattr(launch, "chip", lambda device: launch.Chip("sm_90", 132))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr("dkv.kernels.dev.autotune.search", fake)
    monkeypatch.setenv("DKV_AUTOTUNE", "1")
    return searched


def started(table: LaunchTable, regime, row: Launch | None = None) -> list[Launch]:
    ran = []

    def calls(row: Launch) -> list:
        ran.append(row)
        return []

    with launch.trial(launch=row):
        table.start(lambda x: (regime, calls), (torch.zeros(1),))
    return ran


def test_start_searches_once_per_regime(gpu):
    table = made(SMALL)
    assert started(table, MANY) == started(table, MANY) == started(table, FEW) == [MIDDLE]
    assert gpu == [("sm_90", MANY), ("sm_90", FEW)]


def test_start_uses_what_was_found_inside_a_graph(gpu, monkeypatch):
    table = made(SMALL)
    started(table, MANY)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert started(table, MANY) == [MIDDLE] and started(table, FEW) == [SMALL]
    assert gpu == [("sm_90", MANY)]


def test_start_does_not_search(gpu, monkeypatch):
    assert started(made(), MANY) == [LARGE]  # no candidates
    assert started(made(SMALL), MANY, HUGE) == [HUGE]  # the caller's launch
    with monkeypatch.context() as patch:
        patch.setattr(launch, "chip", lambda device: launch.Chip("interpreter", 4))
        assert started(made(SMALL), MANY) == [MIDDLE]
    monkeypatch.setenv("DKV_AUTOTUNE", "0")
    assert started(made(SMALL), MANY) == [LARGE]
    assert gpu == []


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "columns", "expected"),
    [
        ("sm_90", 32, 8, 0, 0, 1.0),
        ("sm_90", 33, 8, 0, 0, 48 / 64),  # 40 registers are taken: 12 warps in each of 4 parts
        ("sm_90", 255, 4, 0, 0, 8 / 64),
        ("sm_90", 128, 8, 100 * 1024, 0, 16 / 64),  # 101 KB each: two of them
        ("sm_90", 32, 8, 227 * 1024, 0, 8 / 64),
        ("sm_80", 32, 8, 100 * 1024, 0, 8 / 64),
        ("sm_80", 16, 1, 0, 0, 32 / 64),  # 32 programs
        ("sm_100", 32, 8, 0, 256, 16 / 64),  # half of the tensor memory each
        ("gfx942", 64, 4, 0, 0, 1.0),
        ("gfx942", 128, 4, 0, 0, 16 / 32),
        ("gfx942", 129, 4, 0, 0, 12 / 32),
        ("gfx942", 64, 4, 40 * 1024, 0, 4 / 32),
    ],
)
def test_occupancy(arch, registers, warps, shared, columns, expected):
    assert audit.occupancy(audit.CHIPS[arch], registers, warps, shared, columns) == expected


@pytest.mark.parametrize(
    ("arch", "changes", "expected"),
    [
        ("sm_90", {}, []),
        ("sm_90", {"stack": 8}, ["8 bytes of stack"]),
        ("sm_90", {"spills": 4}, ["4 bytes of spills"]),
        ("sm_90", {"shared": 1000}, []),
        ("sm_90", {"shared": 1025}, ["1.0 KB of shared memory, 1 KB allowed"]),
        ("sm_90", {"instructions": ["mma.sync", "cp.async"]}, ["no wgmma"]),
        ("sm_90", {"instructions": []}, ["no tensor core", "no wgmma", "no async copy"]),
        ("sm_80", {"instructions": ["mma.sync", "cp.async"]}, []),
        ("sm_100", {"instructions": ["tcgen05", "cp.async.bulk"]}, []),
        ("sm_100", {"tensor_columns": 1024}, ["1024 columns of tensor memory, 512 allowed"]),
        ("gfx942", {"instructions": ["v_mfma"]}, []),
        ("gfx942", {"instructions": []}, ["no tensor core"]),
    ],
)
def test_budget(arch, changes, expected):
    case = Case("x", Call(None, (1,), SMALL, {}), ("tensor core", "wgmma", "async copy"))
    found = {"stack": 0, "spills": 0, "shared": 0, "tensor_columns": 0, "instructions": ["wgmma", "cp.async"]}
    assert audit.broken(case, arch, 1024, found | changes) == expected
