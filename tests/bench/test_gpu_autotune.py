"""Part `autotune` of `dkv.bench.gpu`: candidates are compiled by several processes and timed by one."""

from types import SimpleNamespace

import pytest
import torch

from dkv.bench.gpu import autotune as part
from dkv.bench.gpu.lab import Lab

pytest.importorskip("triton")

from dkv.kernels.common.launch import Launch, LaunchTable
from dkv.kernels.dev import autotune

CANDIDATES = [Launch((size,), 4) for size in (16, 32, 64, 128, 256)]
TABLE = LaunchTable("some", {"default": {"few": CANDIDATES[0]}}, CANDIDATES)
LAB = Lab(torch.device("cpu"), ["torch"], {})


@pytest.fixture
def search(monkeypatch):
    """search(share) -> what is told, and the launches that ran; the kernels themselves are left out."""

    def go(share, broken=()):
        ran = []

        def call(launch):
            ran.append(launch)
            if launch in broken:
                raise RuntimeError("does not compile")

        monkeypatch.setattr(part, "quick_ms", lambda run: run() or 1 / ran[-1].tile[0])
        whole = autotune.search
        case = SimpleNamespace(run_by=lambda way: autotune.search(TABLE, "sm_90", "few", call))
        found = part.search(LAB, lambda: case, share)
        assert autotune.search is whole
        return found, ran

    return go


def test_each_process_compiles_its_share(search):
    found = [search((i, 2), broken=CANDIDATES[:1]) for i in range(2)]
    assert [told for told, _ in found] == [None, None]
    assert [ran for _, ran in found] == [CANDIDATES[::2], CANDIDATES[1::2]]


def test_one_times_all_and_tells_the_entry(search):
    told, ran = search(None, broken=CANDIDATES[-1:])
    assert ran == CANDIDATES and "1 do not run" in told["told"]
    assert told["told"].endswith('"sm_90": {"few": Launch((128,), 4)},')
