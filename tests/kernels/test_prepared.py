"""Launches that are made ready: with which tensors they may start again, and with which not."""

import contextlib
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton

from dkv.kernels import Workspace
from dkv.kernels.common import launch
from dkv.kernels.common.arguments import constants, strided
from dkv.kernels.common.launch import Call, Launch, LaunchTable
from dkv.kernels.common.prepared import Scratch

ROOT = Path(__file__).parents[2]
SMALL = Launch((16,), 4)
KNOWN = constants(SIZE=3)


class Kernel:
    """Stands in for a jitted function: notes what it was compiled for, and what it was started with."""

    arg_names = ("x", "pair", "scratch", "eps", "C")

    def __init__(self):
        self.compiled, self.started = [], []

    def __getitem__(self, grid):
        def compile_and_start(**arguments):
            self.compiled.append(arguments)
            return SimpleNamespace(run=lambda *given: self.started.append(given), function="f", packed_metadata="m")

        return compile_and_start


@pytest.fixture
def driver(monkeypatch):
    """A process that is not in the interpreter, with a driver whose stream is another one every time."""
    streams = iter(range(100, 200))
    stand_in = SimpleNamespace(get_current_device=lambda: -1, get_current_stream=lambda device: next(streams))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "chip_of", lambda device: launch.Chip("sm_90", 132))
    monkeypatch.setattr(triton.runtime.driver, "_active", stand_in)
    return stand_in


@pytest.fixture
def kernel():
    return Kernel()


@pytest.fixture
def start(driver, kernel):
    """Start the kernel with tensors x and y, y in a tuple with its strides, and scratch memory as large as x."""
    table = LaunchTable("op", {"default": {"all": SMALL}})

    def plan(x, y, eps):
        arguments = {"x": x, "pair": strided(y), "scratch": Scratch("s", x.shape, x.dtype), "eps": eps, "C": KNOWN}
        return "all", lambda how: [Call(kernel, (x.shape[0], 2), how, arguments)]

    return lambda x, y, eps=0.5, work=None: table.start(plan, (x, y), eps, work=work)


def test_other_tensors_of_the_same_form_start_at_once(start, kernel):
    work = Workspace()
    for _ in range(3):
        x, y = torch.zeros(4, 6), torch.zeros(5, 7)
        start(x, y, work=work)
        scratch = work.take("s", (4, 6), torch.float32, x.device)
        if kernel.started:
            *grid, _stream, function, metadata, a, b, c, first, pair, memory, eps, known = kernel.started[-1]
            assert (grid, function, metadata, eps) == ([4, 2, 1], "f", "m", 0.5) and known == KNOWN
            assert first is x and pair[0] is y and pair[1] == (7, 1) and memory.data_ptr() == scratch.data_ptr()
            assert (a, b, c) == (None, None, None)
    assert len(kernel.compiled) == 1 and len(kernel.started) == 2
    assert [given[3] for given in kernel.started] == [100, 101]  # the stream of the moment


BYTES = torch.zeros(4 * 64 + 16, dtype=torch.uint8)
# What differs from x, y = zeros(4, 6), zeros(6, 6).
OTHERS = {
    "dtype": (torch.zeros(4, 6, dtype=torch.int32), torch.zeros(6, 6)),
    "size": (torch.zeros(5, 6), torch.zeros(6, 6)),
    "strides": (torch.zeros(4, 6), torch.zeros(6, 6).t()),
    "strides of a part": (torch.zeros(4, 8)[:, :6], torch.zeros(6, 6)),
    "address": (torch.zeros(4, 6), BYTES[4 : 4 + 144].view(torch.float32).view(6, 6)),
    "none": (torch.zeros(4, 6), None),
    "value": (torch.zeros(4, 6), torch.zeros(6, 6), 0.25),
}


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("what", OTHERS)
def test_another_form_is_compiled_for(start, kernel, what, first):
    both = [(torch.zeros(4, 6), torch.zeros(6, 6)), OTHERS[what]]
    for given in reversed(both) if first else both:
        start(*given)
    assert len(kernel.compiled) == 2 and not kernel.started
    for given in both:
        start(*given)
    assert len(kernel.compiled) == 2 and len(kernel.started) == 2


def test_one_tensor_twice_is_not_the_same_as_two(start, kernel):
    x = torch.zeros(6, 6)
    start(x, x)
    x, y = torch.zeros(6, 6), torch.zeros(6, 6)
    start(x, y)
    assert len(kernel.compiled) == 1 and kernel.started[0][9] is x and kernel.started[0][10][0] is y


def test_another_device_has_its_own_and_is_made_the_current_one(start, kernel, driver, monkeypatch):
    x, y, entered = torch.zeros(4, 6), torch.zeros(6, 6), []

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        driver.get_current_device = lambda: index
        yield

    start(x, y)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda x: 1)
    start(x, y)
    assert len(kernel.compiled) == 2
    monkeypatch.setattr(torch.cuda, "device", device)
    start(x, y)
    assert entered == [1] and len(kernel.started) == 1


def test_hooks_get_every_launch(start, kernel, monkeypatch):
    x, y = torch.zeros(4, 6), torch.zeros(6, 6)
    start(x, y)
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "launch_enter_hook", print)
        start(x, y)
    assert len(kernel.compiled) == 2 and not kernel.started
    start(x, y)
    assert len(kernel.started) == 1


def test_a_trial_gets_its_own_launches(start, kernel):
    x, y = torch.zeros(4, 6), torch.zeros(6, 6)
    start(x, y)
    with launch.trial(launch=Launch((32,), 8)):
        start(x, y)
    with launch.trial(chip=launch.Chip("sm_80", 108)) as tried:
        start(x, y)
    assert len(kernel.compiled) == 2 and not kernel.started and len(tried.calls) == 1
    with launch.trial(chip=launch.Chip("sm_80", 108), collect=False):
        start(x, y)
    assert len(kernel.compiled) == 3


def test_nothing_is_held(start, kernel):
    x, y = torch.zeros(4, 6), torch.zeros(6, 6)
    memory = weakref.ref(x.untyped_storage())
    gone = weakref.ref(x)
    start(x, y)
    start(x, y)
    kernel.compiled.clear()
    kernel.started.clear()
    del x
    assert gone() is None and memory() is None


def test_no_more_than_so_many_are_kept(start, kernel, monkeypatch):
    monkeypatch.setattr(launch, "MOST_READY", 2)
    for size in (1, 2, 3, 3, 2):
        start(torch.zeros(size, 6), torch.zeros(6, 6))
    assert len(kernel.compiled) == 4 and len(kernel.started) == 1


# Another number of rows must find its kernels compiled.
LENGTHS = """
import torch
from dkv import kernels
from dkv.bench.null_driver import null_driver

with kernels.use_backend("triton"), null_driver() as null:
    found = []
    for rows in (1, 16, 17, 33, 48, 512):
        x = torch.zeros(rows, 64)
        for _ in range(2):
            kernels.rms_norm(x, x[0], residual=x.clone())
            kernels.swiglu(x)
        found.append(null.compiled)
    print(found, null.launches)
"""


def test_kernels_of_norm_and_gate_are_compiled_once(tmp_path):
    """In a process of its own, where Triton compiles, and launches on a driver that does nothing."""
    environment = {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", LENGTHS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split("] ") == ["[2, 2, 2, 2, 2, 2", "24\n"], done.stderr
