"""What each of several processes reads and holds of a model."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open

import dkv
from dkv.models.families import FAMILIES
from dkv.models.shards import SPLITS, _split_of, check_heads
from dkv.parallel import Ranks
from tests.dkv.sharing import FAMILIES as FOLDERS
from tests.dkv.sharing import PLAIN, ROOT, small_gemma
from tests.models.conftest import Checkpoint
from tests.together import together

CPU = torch.device("cpu")


def part(folder, rank, size=2, **how):
    """The model of one process; loading needs no other."""
    return dkv.load(folder, ranks=Ranks(rank, size, CPU, store=None), **{"pack": False, **how})


def put_together(name, parts):
    """A whole parameter from those of the processes, or the one that all have."""
    split = _split_of(name)
    if split is None:
        assert all(torch.equal(x, parts[0]) for x in parts)
        return parts[0]
    runs = zip(*(x.chunk(split.runs, split.dim) for x in parts), strict=True)
    return torch.cat([torch.cat(run, split.dim) for run in runs], split.dim)


@pytest.mark.parametrize("folder", [*PLAIN.values(), *FOLDERS, "gemma"], ids=str)
def test_the_parts_make_up_the_whole(folder, tmp_path):
    folder = small_gemma(tmp_path / "gemma") if folder == "gemma" else ROOT / folder
    whole = dict(dkv.load(folder, device="cpu", pack=False).named_parameters())
    parts = [dict(part(folder, rank).named_parameters()) for rank in range(2)]
    # A bias behind a sum is in the first process alone.
    assert parts[0].keys() == whole.keys()
    assert all("o_proj.bias" in name or "down_proj.bias" in name for name in whole.keys() - parts[1].keys())
    for name, parameter in whole.items():
        mine = [x[name] for x in parts if name in x]
        assert torch.equal(put_together(name, mine) if len(mine) == 2 else mine[0], parameter), name
        assert not mine[0].requires_grad and mine[0].is_contiguous()
        # No view of a larger tensor.
        assert mine[0].untyped_storage().nbytes() == mine[0].nbytes
    held = [sum(p.numel() for name, p in x.items() if _split_of(name)) for x in parts]
    assert abs(held[0] - held[1]) <= 0.05 * held[0]


@pytest.mark.parametrize("pattern", SPLITS)
def test_every_pattern_is_of_use(pattern, tmp_path):
    names = {n for f in (*PLAIN.values(), *FOLDERS) for n, _ in dkv.load(ROOT / f, pack=False).named_parameters()}
    names |= {name for name, _ in dkv.load(small_gemma(tmp_path / "gemma"), pack=False).named_parameters()}
    assert any(_split_of(name) is SPLITS[pattern] for name in names)


def test_no_more_is_read_than_is_held(small, monkeypatch):
    read = []

    class Spy:
        def __init__(self, *given, **how):
            self.file = safe_open(*given, **how)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *ended):
            return self.file.__exit__(*ended)

        def get_slice(self, name):
            view = self.file.get_slice(name)

            class Slices:
                def __getitem__(self, part):
                    read.append(view[part].numel())
                    return view[part]

            return Slices()

    monkeypatch.setattr("dkv.models.loader.safe_open", Spy)
    model = part(small().folder, 1)
    assert sum(read) == model.num_parameters < 0.6 * dkv.models.Transformer(model.spec).num_parameters


def test_a_fused_tensor_and_shards_of_files(small):
    checkpoint = small("dream")
    whole = dkv.load(checkpoint.folder, pack=False)
    checkpoint.shard()
    for rank in range(2):
        mine = part(checkpoint.folder, rank)
        assert torch.equal(mine.layers[1].o_proj.weight, whole.layers[1].o_proj.weight[:, rank * 8 : rank * 8 + 8])
        assert torch.equal(mine.layers[1].k_proj.bias, whole.layers[1].k_proj.bias[rank * 4 : rank * 4 + 4])


def test_a_table_that_does_not_divide_and_three_processes(small):
    """Ids are split as evenly as can be; so are features."""
    checkpoint = small(n_heads=6, n_kv_heads=3, d_model=24, vocab_size=65, embedding_size=65, mlp_hidden_size=25)
    whole = dkv.load(checkpoint.folder, dtype="float64", pack=False)
    ids = torch.randint(0, 60, (2, 7))

    def call(ranks):
        model = dkv.load(checkpoint.folder, dtype="float64", ranks=ranks)
        with torch.no_grad():
            output = dkv.generate(model, ids, max_new_tokens=6, cache="dual")
            return output.kv_cache.kind[1], model(ids), output.sequences

    expected = dkv.generate(whole, ids, max_new_tokens=6, cache="dual").sequences
    for heads, logits, sequences in together(3, call):
        assert heads == 1 and torch.equal(sequences, expected)
        torch.testing.assert_close(logits, whole(ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 4, "2 key heads cannot be split over 4 processes: start 2 of them, or one"),
        ({"n_kv_heads": 1}, 2, "1 key heads cannot be split over 2 processes: start one"),
        ({"n_heads": 8, "n_kv_heads": 8}, 3, "8 key heads cannot be split over 3 processes: start 2 or 4 or 8 of them"),
        ({"n_heads": 8, "n_kv_heads": 8, "mlp_hidden_size": 5}, 8, "5 features cannot be split over 8 processes"),
    ],
)
def test_what_cannot_be_split_is_refused_with_both_numbers(small, changes, size, message):
    with pytest.raises(ValueError, match=message):
        part(small(**changes).folder, 0, size)


@pytest.mark.parametrize(
    ("how", "other", "named"), [({}, {"n_layers": 3}, "model"), ({"dtype": "float64"}, {}, "dtype")]
)
@pytest.mark.parametrize("work", ["generate", "map"])
def test_processes_with_different_models_are_told(tmp_path, how, other, named, work):
    folders = [Checkpoint(tmp_path / str(i), "llada", **changes).folder for i, changes in enumerate(({}, other))]

    def call(ranks):
        model = dkv.load(folders[ranks.rank], ranks=ranks, **(how if ranks.rank else {}))
        with pytest.raises(ValueError, match=rf"^{named}: the processes were given different ones"):
            if work == "map":
                dkv.map(model, [{"prompt": [1, 2]}], max_new_tokens=2, progress=False)
            dkv.generate(model, torch.tensor([[1, 2]]), max_new_tokens=2)

    together(2, call)


def test_a_layer_of_another_kind_counts_too():
    folder = ROOT / "tests/golden/families/diffusion_gemma/gemma_tiny"
    with pytest.raises(ValueError, match="1 key heads cannot be split over 2 processes"):
        check_heads(FAMILIES["diffusion_gemma"].spec(json.loads((folder / "config.json").read_text())), 2)


def test_what_does_not_go_with_several_processes(small):
    folder = small().folder
    with pytest.raises(ValueError, match="pack=True is of whole models"):
        part(folder, 0, pack=True)
    with pytest.raises(ValueError, match="device='cuda:0' does not go with ranks"):
        part(folder, 0, device="cuda:0")


def test_a_damaged_file_is_told_as_ever(small):
    checkpoint = small()
    file = checkpoint.folder / "model.safetensors"
    shutil.copy(file, checkpoint.folder / "kept")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="truncated"):
        part(checkpoint.folder, 1)
