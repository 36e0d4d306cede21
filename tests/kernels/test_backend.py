"""use_backend, DKV_BACKEND, which backend a device gets, Workspace and what the package offers."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dkv.kernels
from dkv.kernels import BACKENDS, Workspace, commit_, use_backend
from dkv.kernels.common import backend, launch
from dkv.kernels.common.backend import load

# By public name the package, and the function of each of its backends.
OPERATIONS = {
    "advance_": ("commit", "advance_"),
    "attention_mass": ("mass", "attention_mass"),
    "cached_attention": ("attention", "cached_attention"),
    "choose_token": ("choose", "choose_token"),
    "choose_token_fused": ("choose", "choose_token_fused"),
    "commit_": ("commit", "commit_"),
    "int4_linear": ("linear", "int4_linear"),
    "int8_linear": ("linear", "int8_linear"),
    "keep_rows_": ("change", "keep_rows_"),
    "pack_pass": ("plan", "pack"),
    "plan_pass": ("plan", "plan"),
    "rms_norm": ("norm", "rms_norm"),
    "row_change": ("change", "row_change"),
    "rope_scatter_": ("rope_scatter", "rope_scatter_"),
    "swiglu": ("gate", "swiglu"),
    "with_masked_window": ("plan", "with_masked_window"),
}
ROOT = Path(__file__).parents[2]
X = torch.zeros(1, 2)
LONGS = torch.zeros(1, 2, dtype=torch.int64)


def call() -> torch.Tensor:
    return commit_(LONGS.clone(), LONGS, X, LONGS.bool(), LONGS[:, 0])


needs_triton = pytest.mark.skipif(not backend.has_triton(), reason="needs triton")
INSTALLED = [pytest.param(name, marks=needs_triton if name == "triton" else ()) for name in BACKENDS]


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("DKV_BACKEND", raising=False)


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: False)


@needs_triton
def test_default_of_a_device():
    assert {kind: backend.default(torch.device(kind)) for kind in ("cpu", "cuda", "mps", "meta")} == {
        "cpu": "torch",
        "cuda": "triton",
        "mps": "torch",
        "meta": "torch",
    }
    assert backend.current(X) == "torch"


def test_default_without_triton(without_triton):
    assert backend.default(torch.device("cuda:1")) == "torch"


@pytest.fixture
def gpu_of(monkeypatch):
    """A process that takes its GPU to be of a compute capability."""

    def call(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        backend.too_old.cache_clear()

    yield call
    backend.too_old.cache_clear()


@needs_triton
@pytest.mark.parametrize(("capability", "name"), [((7, 5), "torch"), ((8, 0), "triton"), ((12, 0), "triton")])
def test_default_of_a_gpu(capability, name, gpu_of):
    gpu_of(*capability)
    assert backend.default(torch.device("cuda:0")) == name
    assert backend.default(torch.device("cpu")) == "torch"


@needs_triton
def test_triton_chosen_for_a_gpu_that_is_too_old(gpu_of, monkeypatch):
    gpu_of(7, 5)
    on_gpu = SimpleNamespace(device=torch.device("cuda:1"), dtype=torch.float16, is_cuda=True)
    message = (
        r"^backend 'triton' was chosen, but cuda:1 is of compute capability 7\.5 and the kernels need 8\.0: choose "
        "'torch', which is the default there$"
    )
    with use_backend("triton"), pytest.raises(ValueError, match=message):
        backend.current(on_gpu)
    monkeypatch.setenv("DKV_BACKEND", "triton")
    with pytest.raises(ValueError, match=message):
        backend.current(on_gpu)
    monkeypatch.delenv("DKV_BACKEND")
    assert backend.current(on_gpu) == "torch"


@pytest.mark.parametrize("name", INSTALLED)
def test_use_backend_reaches_the_operations(name, monkeypatch):
    marker = torch.tensor([7])
    if name == "triton":
        monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr(load("commit", name), "commit_", lambda *_: marker)
    with use_backend(name):
        assert call() is marker
    with use_backend("torch" if name == "reference" else "reference"):
        assert call() is not marker


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_backend_has_every_operation(operation, name):
    package, function = OPERATIONS[operation]
    assert operation in dkv.kernels.__all__
    assert callable(getattr(load(package, name), function))


def test_blocks_nest_and_end_on_errors():
    with use_backend("reference"):
        with pytest.raises(KeyError), use_backend("torch"):
            assert backend.current(X) == "torch"
            raise KeyError
        assert backend.current(X) == "reference"
    assert backend.current(X) == "torch"


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("DKV_BACKEND", "reference")
    assert backend.current(X) == "reference"
    with use_backend("torch"):
        assert backend.current(X) == "torch"


def test_unknown_names(monkeypatch):
    message = r"^use_backend: unknown backend 'cuda'; known are reference, torch, triton$"
    with pytest.raises(ValueError, match=message), use_backend("cuda"):
        pass
    monkeypatch.setenv("DKV_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"^DKV_BACKEND: unknown backend 'fast'"):
        call()


def test_triton_chosen_where_it_is_not_installed(monkeypatch, without_triton):
    message = "backend 'triton' needs the package triton, which is not installed"
    with pytest.raises(ValueError, match=f"^use_backend: {message}$"), use_backend("triton"):
        pass
    monkeypatch.setenv("DKV_BACKEND", "triton")
    with pytest.raises(ValueError, match=f"^DKV_BACKEND: {message}$"):
        call()


@needs_triton
def test_float64_runs_on_torch(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", True)
    with use_backend("triton"):
        assert backend.current(X) == "triton" and backend.current(X.double()) == "torch"
    with use_backend("reference"):
        assert backend.current(X.double()) == "reference"


@needs_triton
def test_triton_on_cpu_tensors_without_the_interpreter():
    """The interpreter is chosen when Triton's kernels are imported, hence in a process of its own."""
    code = (
        "import torch; from dkv.kernels import cached_attention\n"
        "for dtype in (torch.float32, torch.float64):\n"
        "    try: cached_attention(*[torch.zeros(1, 1, 1, 16, dtype=dtype)] * 3)\n"
        "    except ValueError as error: print(error)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0", "DKV_BACKEND": "triton"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    message = (
        "backend 'triton' was chosen, but the tensors are on cpu: move them to a GPU, or set "
        "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
    )
    assert done.stdout.splitlines() == [message] * 2


def test_threads_choose_for_themselves():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backend.current(X)))
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_functions_are_not_hidden_by_modules():
    """A module named like its function would replace it as soon as anyone imports the module."""
    assert "dkv.kernels.common.backend" in sys.modules
    assert not {f"dkv.kernels.{name}" for name in dkv.kernels.__all__} & set(sys.modules)


def test_workspace_keeps_the_largest_of_each_kind():
    work = Workspace()
    cpu = torch.device("cpu")
    large = work.take("a", (4, 8), torch.float32, cpu)
    small = work.take("a", (3, 5), torch.float32, cpu)
    assert small.shape == (3, 5)
    assert small.data_ptr() == large.data_ptr()
    assert work.nbytes == 4 * 8 * 4
    assert work.take("a", (2,), torch.bfloat16, cpu).data_ptr() != large.data_ptr()
    assert work.take("b", (2,), torch.float32, cpu).data_ptr() != large.data_ptr()
    work.take("a", (5, 8), torch.float32, cpu)
    assert work.nbytes == 5 * 8 * 4 + 2 * 2 + 2 * 4
    assert work.take("a", (0, 3), torch.float32, cpu).shape == (0, 3)
