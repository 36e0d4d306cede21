"""`dkv info` as text and as JSON."""

import json
from types import SimpleNamespace

import torch


def test_info(run):
    code, out, err = run("info")
    assert (code, err) == (0, "")
    for word in ("dkv 0", "torch 2", "cpu ", "Triton kernels are not part", "tiny ", "decode ", "refresh=8"):
        assert word in out
    facts = json.loads(run("info", "--json")[1])
    assert facts["devices"]["cpu"]["torch_threads"] == torch.get_num_threads()
    assert facts["backends"]["used"] == "torch" and set(facts["backends"]["known"]) >= {"torch", "reference"}
    assert facts["policies"]["greedy"]["window"] == 4 and facts["versions"]["torch"] == torch.__version__


def test_info_names_the_gpus_and_the_chosen_backend(run, monkeypatch):
    card = SimpleNamespace(name="H100", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setenv("DKV_BACKEND", "reference")
    out = run("info")[1]
    assert "cuda:0     H100, 80.0 GiB, CUDA" in out and "used on every device: reference" in out
    monkeypatch.setenv("DKV_BACKEND", "abacus")
    assert run("info")[0] == 2
