"""Small checkpoints of the families, and ways to damage them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dkv.models.families import FAMILIES
from dkv.models.transformer import Transformer

SMALL = json.loads("""
{
    "llada": {
        "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 16, "n_heads": 4, "n_kv_heads": 2,
        "n_layers": 2, "mlp_hidden_size": 24, "vocab_size": 64, "embedding_size": 64, "max_sequence_length": 128,
        "block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": true, "alibi": false,
        "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "include_bias": false, "include_qkv_bias": false,
        "weight_tying": false, "mask_token_id": 63, "eos_token_id": 62, "pad_token_id": 62
    },
    "dream": {
        "model_type": "Dream", "architectures": ["DreamModel"], "hidden_size": 16, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24, "vocab_size": 64,
        "max_position_embeddings": 128, "hidden_act": "silu", "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
        "rope_scaling": null, "use_sliding_window": false, "tie_word_embeddings": false,
        "mask_token_id": 63, "eos_token_id": 62, "pad_token_id": 62
    }
}
""")
_DECODER = {name: value for name, value in SMALL["dream"].items() if name not in ("model_type", "architectures")}
_DECODER |= {"head_dim": 6, "attention_bias": False}
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
SMALL |= {
    "sdar": {**_DECODER, "model_type": "sdar", "architectures": ["SDARForCausalLM"], "block_size": 4},
    "a2d-llama": {**_DECODER, "model_type": "a2d-llama", "architectures": ["A2DLlamaLMHeadModel"], "mlp_bias": False},
    "nemotron": {
        **_DECODER,
        "model_type": "nemotron_labs_diffusion",
        "architectures": ["NemotronLabsDiffusionModel"],
        "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        "block_size": 8,
    },
}


class Checkpoint:
    """A folder with random weights; tests change `config` or `tensors` and write it again."""

    def __init__(self, folder: Path, family: str, dtype=torch.float32, **changes):
        self.folder, self.config = folder, {**SMALL[family], **changes}
        model = Transformer(FAMILIES[family].spec(self.config))
        pieces = FAMILIES[family].pieces({name: tuple(p.shape) for name, p in model.named_parameters()})
        noise = torch.Generator().manual_seed(0)
        self.tensors = {
            name: (0.3 * torch.randn(part.shape, generator=noise)).to(dtype) for name, (part,) in pieces.items()
        }
        self.write()

    def write(self, **changes) -> Path:
        """Write the folder anew, with `changes` to the configuration; return it."""
        self.config |= changes
        self.folder.mkdir(exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
        return self.folder

    def shard(self) -> Path:
        """Split the weights over two files with an index; return the index."""
        (self.folder / "model.safetensors").unlink()
        places = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(self.tensors)}
        for shard in set(places.values()):
            save_file({n: t for n, t in self.tensors.items() if places[n] == shard}, self.folder / shard)
        index = self.folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
        return index


@pytest.fixture
def small(tmp_path):
    """Make a checkpoint: small("llada", n_layers=3) -> Checkpoint."""
    return lambda family="llada", **changes: Checkpoint(tmp_path / family, family, **changes)


@pytest.fixture(scope="session")
def golden():
    """Recorded cases by pattern: golden("*/cases/forward_*") -> [(model folder, tensors)]."""
    root = Path(__file__).parents[1] / "golden"

    def find(pattern: str) -> list[tuple[Path, dict]]:
        return [(p.parents[1], load_file(p)) for p in sorted(root.glob(f"{pattern}.safetensors"))]

    return find
