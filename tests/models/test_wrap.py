"""Sharing the parameters of a model that is in memory already."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from dkv.models import Transformer, load, wrap

IDS = torch.tensor([[1, 2, 3, 63, 63]])


class InMemory(nn.Module):
    """What a loaded Hugging Face model shows: a config, and parameters under its family's names."""

    def __init__(self, checkpoint, prefix: str = "model.", **config):
        super().__init__()
        self.config = SimpleNamespace(**{**checkpoint.config, **config})
        for name, tensor in checkpoint.tensors.items():
            self.set(name.removeprefix("model.") if prefix == "" else name, nn.Parameter(tensor))

    def set(self, name: str, parameter: nn.Parameter) -> None:
        module = self
        *path, leaf = name.split(".")
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        setattr(module, leaf, parameter)


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_parameters_are_shared(small, family, prefix):
    checkpoint = small(family)
    original = InMemory(checkpoint, prefix)
    model = wrap(original)
    assert isinstance(model, Transformer) and not model.training
    assert {p.data_ptr() for p in model.parameters()} == {p.data_ptr() for p in original.parameters()}
    assert all(p.requires_grad for p in original.parameters())
    loaded = load(checkpoint.folder, device="cpu", pack=False)
    assert model.spec == loaded.spec
    original.config = vars(original.config)
    assert wrap(original).spec == model.spec
    with torch.no_grad():
        before = model(IDS)
        torch.testing.assert_close(before, loaded(IDS), atol=0, rtol=0)
        for p in original.parameters():
            p.mul_(1.5)
            changed = model(IDS)
            assert not torch.equal(changed, before)
            before = changed


def test_a_cast_of_the_original_is_seen(small):
    original = InMemory(small())
    model = wrap(original)
    original.double()
    assert model.dtype == model(IDS).dtype == torch.float64


@pytest.mark.parametrize("stated", [True, False])
def test_tied_head(small, stated):
    checkpoint = small("dream")
    del checkpoint.tensors["lm_head.weight"]
    original = InMemory(checkpoint, tie_word_embeddings=stated)
    original.set("lm_head.weight", original.model.embed_tokens.weight)
    model = wrap(original)
    assert model.head.weight is model.embed.weight is original.model.embed_tokens.weight


def test_a_real_qwen2_layout(small):
    transformers = pytest.importorskip("transformers")
    fields = small("dream").config
    config = transformers.Qwen2Config(**{name: value for name, value in fields.items() if name != "model_type"})
    original = transformers.Qwen2ForCausalLM(config).eval()
    model = wrap(original)
    everywhere = torch.zeros(1, 1, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), original(IDS, attention_mask=everywhere).logits, atol=1e-5, rtol=1e-5)


def test_refused(small):
    checkpoint = small()
    with pytest.raises(ValueError, match="Linear has no config to tell its family"):
        wrap(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"this model is dkv's already: use it as it is"):
        wrap(load(checkpoint.folder, device="cpu"))
    with pytest.raises(ValueError, match="unknown model family: model_type is 'gpt2'"):
        wrap(InMemory(checkpoint, model_type="gpt2", architectures=None))
    with pytest.raises(ValueError, match=r"wte.weight is on the meta device, without storage: load the weights"):
        wrap(InMemory(checkpoint).to("meta"))


def test_quantised_and_mixed_parameters_are_refused(small):
    original, name = InMemory(small()), "model.transformer.ff_out.weight"
    original.set(name, nn.Parameter(torch.ones(64, 16).half()))
    with pytest.raises(ValueError, match=r"several dtypes.*1 of torch.float16.*\.to\(dtype\)"):
        wrap(original)
    original.set(name, nn.Parameter(torch.ones(64, 16).to(torch.uint8), requires_grad=False))
    with pytest.raises(ValueError, match=f"{name} is a Tensor of torch.uint8.*wrap the model first"):
        wrap(original)


def test_names_and_shapes_are_checked(small):
    with pytest.raises(ValueError, match=r"the InMemory in memory lacks tensors.*blocks.2"):
        wrap(InMemory(small(), n_layers=3))
    with pytest.raises(ValueError, match=r"k_proj.weight in the InMemory in memory has shape \[8, 16\].*\[16, 16\]"):
        wrap(InMemory(small(), n_kv_heads=4))
    original = InMemory(small())
    original.value_head = nn.Linear(2, 1, bias=False)
    with pytest.raises(ValueError, match=r"has unexpected tensors: value_head.weight"):
        wrap(original)


def low_rank() -> nn.ModuleDict:
    return nn.ModuleDict({"default": nn.Linear(16, 2, bias=False)})


def one_weight() -> nn.ParameterDict:
    return nn.ParameterDict({"default": nn.Parameter(torch.ones(16, 1))})


ADAPTERS = [
    ({"lora_A": low_rank, "lora_B": low_rank}, "a LoRA adapter"),
    ({"lora_embedding_A": one_weight}, "a LoRA adapter"),
    ({"lora_A": low_rank, "lora_magnitude_vector": low_rank}, "a DoRA adapter"),
    ({"ia3_l": one_weight}, "an IA3 adapter"),
    ({"hada_w1_a": one_weight}, "an adapter of peft"),
    ({"oft_R": low_rank}, "an adapter of peft"),
    ({"vera_lambda_b": one_weight}, "an adapter of peft"),
    # One that nobody has heard of, and one that is there without weights.
    ({"novel": one_weight}, "an adapter"),
    ({}, "an adapter"),
]


@pytest.mark.parametrize(("parts", "what"), ADAPTERS, ids=[" ".join(p) or "bare" for p, _ in ADAPTERS])
@pytest.mark.parametrize("front", [False, True])
def test_R23_adapters_are_named(small, parts, what, front):
    original = whole = InMemory(small())
    block = original.get_submodule("model.transformer.blocks.0")
    # As peft does in the place of a layer: the layer, and adapters by the names of its parameters.
    block.q_proj = nn.ModuleDict({"base_layer": block.q_proj, **{name: make() for name, make in parts.items()}})
    if front:
        whole = nn.ModuleDict({"base_model": nn.ModuleDict({"model": original})})
        whole.config = original.config
    with pytest.raises(ValueError, match=rf"in memory has {what} .*q_proj.*left out.*merge_and_unload"):
        wrap(whole)


def test_R23_a_learned_prompt_is_named(small):
    original = InMemory(small())
    original.prompt_encoder = nn.ModuleDict({"default": nn.Embedding(4, 16)})
    with pytest.raises(ValueError, match=r"has a prompt \(prompt_encoder.*cannot be merged"):
        wrap(original)


ADAPTER_FILES = [
    (
        {"peft_type": "LORA", "base_model_name_or_path": "GSAI-ML/LLaDA-8B-Instruct"},
        "LORA adapter .* of GSAI-ML/LL.*merge_and",
    ),
    ({"peft_type": "IA3"}, "IA3 adapter .*merge_and_unload"),
    ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING adapter .*cannot be merged"),
    ({}, "trained adapter .*merge_and_unload"),
]


@pytest.mark.parametrize(("content", "message"), ADAPTER_FILES, ids=[str(c.get("peft_type")) for c, _ in ADAPTER_FILES])
def test_R23_a_folder_with_an_adapter_is_named(small, tmp_path, content, message):
    beside = small().folder
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "adapter_model.safetensors").touch()
    for folder in (alone, beside):
        (folder / "adapter_config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"{folder} holds a {message}"):
            load(folder)


def test_R23_adapters_among_the_tensors_of_a_file(small, tmp_path):
    checkpoint = small()
    checkpoint.tensors["model.transformer.blocks.0.q_proj.lora_A.default.weight"] = torch.ones(2, 16)
    with pytest.raises(ValueError, match=r"has a LoRA adapter \(model.transformer.blocks.0.q_proj.lora_A"):
        load(checkpoint.write())
    (checkpoint.folder / "model.safetensors").rename(checkpoint.folder / "adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors, the weights of an adapter.*merge"):
        load(checkpoint.folder)


def test_weights_that_are_computed_are_refused(small):
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    # Layers of torch in the place of those of the stand-in.
    def with_linear(change) -> InMemory:
        original = InMemory(small())
        block = original.get_submodule("model.transformer.blocks.0")
        block.q_proj = nn.Linear(16, 16, bias=False)
        change(block.q_proj)
        return original

    changes = {
        "parametrisation": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", Halved()),
        "weight norm": lambda layer: nn.utils.parametrizations.weight_norm(layer),
        "older weight norm": lambda layer: nn.utils.weight_norm(layer),
        "spectral norm": lambda layer: nn.utils.spectral_norm(layer),
        "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    }
    for name, change in changes.items():
        with pytest.raises(ValueError, match=r"q_proj.*which would be left out: make it permanent first"):
            wrap(with_linear(change))
            pytest.fail(name)
    layer = with_linear(lambda layer: prune.remove(prune.l1_unstructured(layer, "weight", 0.5), "weight"))
    assert (wrap(layer).layers[0].q_proj.weight == 0).any()


@pytest.mark.parametrize(
    "name", ["qweight", "qzeros", "g_idx", "weight_scale", "SCB", "weight.absmax", "weight_packed"]
)
def test_quantised_layers_of_other_libraries_are_named(small, name):
    original, layer = InMemory(small()), nn.Module()
    for part in name.split(".")[:-1]:
        layer.add_module(part, inner := nn.Module())
    (inner if "." in name else layer).register_buffer(name.rpartition(".")[2], torch.ones(2, dtype=torch.int32))
    original.get_submodule("model.transformer.blocks.0").q_proj = layer
    with pytest.raises(ValueError, match=rf"has quantised weights .*q_proj.{name}.*original weights"):
        wrap(original)


@pytest.mark.filterwarnings("ignore")
def test_layers_that_torch_quantised_are_named(small):
    original = InMemory(small())
    original.get_submodule("model.transformer.blocks.0").q_proj = nn.Linear(16, 16)
    quantised = torch.ao.quantization.quantize_dynamic(original, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"has quantised weights .*q_proj._packed_params"):
        wrap(quantised)


def test_parameters_of_another_class_are_named(small):
    class Special(nn.Parameter):
        """As libraries do for weights that are more than numbers."""

    original, name = InMemory(small()), "model.transformer.ff_out.weight"
    original.set(name, Special(torch.ones(64, 16)))
    with pytest.raises(ValueError, match=f"{name} is a Special of torch.float32.*wrap the model first"):
        wrap(original)
    original.set(name, nn.parameter.UninitializedParameter())
    with pytest.raises(ValueError, match=f"{name} is a UninitializedParameter"):
        wrap(original)


def test_models_behind_something_that_hands_on(small):
    checkpoint = small()
    expected = wrap(InMemory(checkpoint))(IDS)

    compiled = torch.compile(InMemory(checkpoint))
    for model in (
        compiled,
        nn.DataParallel(InMemory(checkpoint)),
        nn.ModuleDict({"module": InMemory(checkpoint)}),
        nn.ModuleDict({"module": compiled}),
        torch.optim.swa_utils.AveragedModel(InMemory(checkpoint)),
    ):
        assert torch.equal(wrap(model)(IDS), expected)
    # One part of it compiled, and one checkpointed.
    original = InMemory(checkpoint)
    blocks = original.get_submodule("model.transformer.blocks")
    blocks.add_module("0", torch.compile(blocks.get_submodule("0")))
    blocks.add_module("1", nn.ModuleDict({"_checkpoint_wrapped_module": blocks.get_submodule("1")}))
    assert torch.equal(wrap(original)(IDS), expected)


def test_split_models_are_named(small):
    front = nn.ModuleDict({"_fsdp_wrapped_module": InMemory(small())})
    front._fsdp_wrapped_module.register_parameter("_flat_param", nn.Parameter(torch.ones(9)))
    with pytest.raises(ValueError, match=r"a model that FSDP has split .*gather the whole state dict"):
        wrap(front)
    original, name = InMemory(small()), "model.transformer.ff_out.weight"
    original.set(name, nn.Parameter(torch.ones(0)))
    original.get_submodule("model.transformer.ff_out").weight.ds_id = 1
    with pytest.raises(ValueError, match=rf"{name} is split over processes by DeepSpeed ZeRO: gather"):
        wrap(original)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_B11_parameters_on_several_devices_are_refused(small):
    original = InMemory(small())
    original.get_submodule("model.transformer.blocks.1").cuda()
    with pytest.raises(ValueError, match=r"several devices cannot be shared \(.* of cpu, .* of cuda:0\): move"):
        wrap(original)
