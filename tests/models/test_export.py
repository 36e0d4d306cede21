"""Writing checkpoints and tokenizers, and reading them back."""

import pytest
import torch

from dkv.models import load
from dkv.models.bundled.recipes import FIGURES, RECIPES
from dkv.models.export import save_model, save_tokenizer

EOS, MASK = RECIPES["tiny"].eos, RECIPES["tiny"].mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_save_model(small, tmp_path, family, dtype):
    model = load(small(family).folder, device="cpu", dtype=dtype, pack=False)
    save_model(model, tmp_path / "new" / "folder")
    again = load(tmp_path / "new" / "folder", device="cpu", dtype="auto", pack=False)
    assert again.spec == model.spec
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_save_model_keeps_the_old_files_when_it_fails(small, monkeypatch):
    model = load(small().folder, device="cpu", pack=False)
    folder = small().folder
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("dkv.models.export.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_model(model, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.fixture
def tokenizer(small):
    from transformers import AutoTokenizer

    # The configuration beside it is of a type that transformers does not know.
    folder = small().folder
    save_tokenizer(folder, FIGURES, EOS, MASK)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["+7 -3 +9=", "07 04 13", "  1 - 2 ", "", "=", FIGURES])
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == [FIGURES.index(c) for c in text]
    assert tokenizer.decode(ids) == text


def test_tokenizer_marks(tokenizer):
    assert len(tokenizer) == MASK + 1
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (EOS, EOS, MASK)
    ids = tokenizer.encode("1<|mdm_mask|>2<|endoftext|>")
    assert ids == [1, MASK, 2, EOS]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "12"
    batch = tokenizer(["1", "1+1"], padding=True)
    assert batch["input_ids"] == [[EOS, EOS, 1], [1, 10, 1]]
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("text", ["A", "1\n2", "é"])
def test_tokenizer_refuses_unknown_characters(tokenizer, text):
    with pytest.raises(Exception, match=r"Missing .UNK. token"):
        tokenizer.encode(text)
