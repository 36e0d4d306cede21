"""`dkv info` as text and as JSON."""

import json
from types import SimpleNamespace

import pytest
import torch

from dkv.kernels.common import backend


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("DKV_BACKEND", raising=False)


@pytest.fixture
def card(monkeypatch):
    """A machine with one GPU."""
    card = SimpleNamespace(name="H100", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)


def line(out: str, start: str) -> str:
    """The one line that starts with a word."""
    (found,) = (text for text in out.splitlines() if text.split()[:1] == [start])
    return found


def test_info(run):
    code, out, err = run("info")
    assert (code, err) == (0, "")
    for word in ("dkv 0", "torch 2", "cpu ", "chosen by the device", "tiny ", "decode ", "refresh=8"):
        assert word in out
    assert line(out, "cpu").endswith(", backend: torch")
    facts = json.loads(run("info", "--json")[1])
    assert facts["devices"]["cpu"]["torch_threads"] == torch.get_num_threads()
    assert facts["backends"]["chosen"] is None and facts["backends"]["used"]["cpu"] == "torch"
    assert set(facts["backends"]["known"]) == {"triton", "torch", "reference"}
    assert facts["backends"]["triton_installed"] == backend.has_triton()
    assert facts["policies"]["greedy"]["window"] == 4 and facts["versions"]["torch"] == torch.__version__


@pytest.mark.skipif(not backend.has_triton(), reason="needs triton")
def test_the_device_decides_which_backend_runs(run, card):
    out = run("info")[1]
    assert "cuda:0     H100, 80.0 GiB, CUDA" in out and line(out, "cuda:0").endswith(", backend: triton")
    assert line(out, "cpu").endswith(", backend: torch")
    assert "fused Triton kernels" in line(out, "triton")


def test_without_triton(run, card, monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    out = run("info")[1]
    assert line(out, "cuda:0").endswith(", backend: torch")
    assert line(out, "triton") == "  triton     not installed: pip install triton"


def test_a_chosen_backend(run, card, monkeypatch):
    monkeypatch.setenv("DKV_BACKEND", "reference")
    out = run("info")[1]
    assert line(out, "cuda:0").endswith("backend: reference") and line(out, "cpu").endswith("backend: reference")
    assert "chosen by DKV_BACKEND: reference" in out
    monkeypatch.setenv("DKV_BACKEND", "abacus")
    assert run("info")[0] == 2


@pytest.mark.skipif(not backend.has_triton(), reason="needs triton")
@pytest.mark.parametrize("interpreted", [False, True])
def test_triton_chosen_on_the_cpu(run, monkeypatch, interpreted):
    monkeypatch.setenv("DKV_BACKEND", "triton")
    monkeypatch.setattr(backend, "interpreted", lambda: interpreted)
    wanted = "triton" if interpreted else "none (Triton runs there with TRITON_INTERPRET=1 alone)"
    assert line(run("info")[1], "cpu").endswith(f", backend: {wanted}")
