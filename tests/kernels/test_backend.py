"""use_backend, DKV_BACKEND, Workspace and what the package offers."""

import sys
import threading

import pytest
import torch

import dkv.kernels
from dkv.kernels import BACKENDS, Workspace, backend, gather_rows, use_backend

OPERATIONS = [
    "cached_attention", "choose_token", "choose_token_fused", "commit_", "gather_rows", "rope_scatter_",
    "scatter_rows_",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("DKV_BACKEND", raising=False)


def test_torch_is_the_default():
    assert backend.current() is BACKENDS["torch"]


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_use_backend_reaches_the_operations(name, monkeypatch):
    marker = torch.tensor([7])
    monkeypatch.setattr(BACKENDS[name], "gather_rows", lambda x, index: marker)
    with use_backend(name):
        assert gather_rows(torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.int64)) is marker
    other = next(b for b in BACKENDS if b != name)
    with use_backend(other):
        assert gather_rows(torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.int64)) is not marker


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_backend_has_every_operation(operation):
    assert operation in dkv.kernels.__all__
    assert all(callable(getattr(module, operation)) for module in BACKENDS.values())


def test_blocks_nest_and_end_on_errors():
    with use_backend("reference"):
        with pytest.raises(KeyError), use_backend("torch"):
            assert backend.current() is BACKENDS["torch"]
            raise KeyError
        assert backend.current() is BACKENDS["reference"]
    assert backend.current() is BACKENDS["torch"]


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("DKV_BACKEND", "reference")
    assert backend.current() is BACKENDS["reference"]
    with use_backend("torch"):
        assert backend.current() is BACKENDS["torch"]


def test_unknown_names(monkeypatch):
    message = r"^use_backend: unknown backend 'cuda'; known are reference, torch"
    with pytest.raises(ValueError, match=message), use_backend("cuda"):
        pass
    monkeypatch.setenv("DKV_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"^DKV_BACKEND: unknown backend 'fast'"):
        gather_rows(torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.int64))


def test_threads_choose_for_themselves():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backend.current()))
        thread.start()
        thread.join()
    assert seen == [BACKENDS["torch"]]


def test_functions_are_not_hidden_by_modules():
    """A module named like its function would replace it as soon as anyone imports the module."""
    assert "dkv.kernels.backend" in sys.modules
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
