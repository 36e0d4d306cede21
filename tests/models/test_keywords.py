"""Arguments of transformers' `from_pretrained`, and devices."""

import huggingface_hub
import pytest
import torch

from dkv.models import load, load_tokenizer, wrap
from dkv.models.keywords import ANSWERS, GRANTED, HUB


def test_R25_auto_is_the_default_device_and_a_map_of_one_is_that(small):
    folder = small().folder
    for asked in ("auto", "cpu", torch.device("cpu"), {"": "cpu"}, {"model.a": "cpu", "model.b": "cpu"}):
        assert load(folder, device_map=asked).device.type in ("cpu", "cuda")
    assert load(folder, device="cpu", device_map="auto").device.type == "cpu"


@pytest.mark.parametrize(
    "asked", ["balanced", "balanced_low_0", "sequential", {"a": 0, "b": 1}, {"a": "cpu", "b": "disk"}]
)
def test_R25_several_devices_are_refused(small, asked):
    with pytest.raises(ValueError, match=r"device_map.*a model lies on one device: pass device='cuda:0'"):
        load(small().folder, device_map=asked)


DEVICES = [
    ("meta", "device='meta' holds no weights, only shapes: pass 'cpu'"),
    ("cpu:3", "device='cpu:3' does not exist, there is one CPU: pass 'cpu'"),
    ("cuda:99", "device='cuda:99' cannot be used here .*: pass 'cpu'"),
    (99, "device=99 cannot be used here .*: pass 'cpu'"),
    ("gpu", "device='gpu' cannot be used here .*: pass 'cpu'"),
    (1.5, "device='1.5' cannot be used here .*: pass 'cpu'"),
    (torch.device("meta"), "device='meta' holds no weights"),
]


@pytest.mark.parametrize(("device", "message"), DEVICES, ids=[str(d) for d, _ in DEVICES])
def test_devices_that_hold_no_model(device, message):
    for name in ("device", "device_map"):
        with pytest.raises(ValueError, match=message) as error:
            load("./nowhere", **{name: device})
        assert "\n" not in str(error.value)


def test_what_happens_anyway_is_granted(small):
    folder = small().folder
    load(folder, device="cpu", use_safetensors=True, **dict.fromkeys(GRANTED, True))
    load(folder, device="cpu", **dict.fromkeys(ANSWERS, None))
    load(folder, device="cpu", load_in_8bit=False, local_files_only=True, token="secret", cache_dir="/nowhere")


@pytest.mark.parametrize("name", ANSWERS)
def test_what_is_not_done_is_refused_before_the_folder_is_read(name):
    value = False if name == "use_safetensors" else "x"
    for reader in (load, load_tokenizer):
        with pytest.raises(ValueError, match=rf"{name}={value!r} is not supported: \w.*"):
            reader("./nowhere", **{name: value})


def test_unknown_arguments():
    with pytest.raises(TypeError, match=r"unknown argument 'dtyp': known are dtype, device, .*, revision"):
        load("tiny", dtyp="float32")
    with pytest.raises(TypeError, match="unknown argument 'device': known are subfolder, revision"):
        load_tokenizer("tiny", device="cpu")
    with pytest.raises(ValueError, match="pack must be True, False or None, got 'yes'"):
        load("tiny", pack="yes")


def test_arguments_for_the_hub_reach_its_client(small, monkeypatch):
    folder, asked = small().folder, {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda i, **k: asked.update(k) or str(folder))
    options = dict.fromkeys(HUB, "x")
    load("some-org/some-model", device="cpu", **options)
    assert {name: asked[name] for name in HUB} == options
    asked.clear()
    load("some-org/some-model", device="cpu", revision=None)
    assert asked.keys() == {"allow_patterns"}


def test_a_revision_of_a_folder_is_refused(small):
    for name in (small().folder, "tiny"):
        with pytest.raises(ValueError, match=r"revision='v1' is for models of the hub"):
            load(name, revision="v1")


def test_a_folder_inside(small, tmp_path, monkeypatch):
    inner, asked = small().folder, {}
    assert load(tmp_path, device="cpu", subfolder=inner.name).spec.family == "llada"
    with pytest.raises(FileNotFoundError, match="has no folder 'other': pass the subfolder"):
        load(tmp_path, subfolder="other")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda i, **k: asked.update(k) or str(tmp_path))
    assert load("some-org/some-model", device="cpu", subfolder=inner.name).spec.family == "llada"
    assert "llada/*.safetensors" in asked["allow_patterns"]


def test_no_subfolder_is_the_folder_itself(small):
    assert load(small().folder, device="cpu", subfolder=None).spec.family == "llada"


@pytest.mark.parametrize("reader", [load, load_tokenizer])
def test_paths_that_are_none(reader, small, monkeypatch):
    monkeypatch.chdir(small().folder)
    with pytest.raises(ValueError, match="path_or_id is empty"):
        reader("")


def test_packing_is_refused_before_a_tensor_is_read(small, monkeypatch):
    from dkv.models import loader

    monkeypatch.setattr(loader, "safe_open", lambda *a, **k: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match=r"only frozen float32 .* can be packed; the model is torch.float16"):
        load(small().folder, device="cpu", dtype="float16", pack=True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="this build of PyTorch cannot pack weights on this CPU: leave out pack=True"):
        load(small().folder, device="cpu", pack=True)


def test_large_checkpoints_show_a_bar_on_a_terminal(small, monkeypatch, capsys):
    from dkv.models import loader

    folder = small().folder
    size = sum(e.bytes for e in loader.read_headers(folder).values())
    load(folder, device="cpu")
    monkeypatch.setattr(loader, "LARGE", size)
    load(folder, device="cpu")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    load(folder, device="cpu")
    shown, asked = capsys.readouterr().err, f"{size / 1000:.1f}k"
    assert "loading: 100%" in shown and f"{asked}/{asked}" in shown
    monkeypatch.setattr(loader, "LARGE", size + 1)
    load(folder, device="cpu")
    assert capsys.readouterr().err == ""


def test_arguments_of_another_kind_are_named():
    for wrong in (5, None, ["tiny"], b"tiny", torch.tensor([1, 2])):
        for call in (load, load_tokenizer):
            with pytest.raises(TypeError, match="path_or_id must be a folder, a hub id or one of tiny, tiny-dream"):
                call(wrong)
            if wrong is not None:  # as in transformers: none
                with pytest.raises(TypeError, match="subfolder must be the name of a folder, got"):
                    call("tiny", subfolder=wrong)
        with pytest.raises(TypeError, match="hf_model must be a model in memory, got"):
            wrap(wrong)
    with pytest.raises(TypeError, match=r"hf_model must be a model in memory, got str: dkv.load takes a path"):
        wrap("tiny")
    with pytest.raises(ValueError, match="device=1000000000000000000000 cannot be used here"):
        load("tiny", device=10**21)
    with pytest.raises(ValueError, match="pack must be True, False or None, got tensor"):
        load("tiny", pack=torch.tensor([1, 2]))
