"""Every model type of transformers that can be built small: with "dkv" it equals eager attention, or it is refused.

What is served and what is refused stands in hf_models.txt, and has to be the same with the version named there; what
does not stand there cannot be built small. With another version all are tried, and only the numbers are compared. To
write it anew:

    DKV_RECORD=1 make test ARGS=tests/dkv/integrations/test_hf_models.py
"""

import contextlib
import copy
import functools
import importlib
import inspect
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedModel
from transformers.utils import ModelOutput

import dkv
from dkv.integrations import hf_attention as hf

if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("few models go through AttentionInterface before transformers 5", allow_module_level=True)

RECORD = Path(__file__).with_name("hf_models.txt")
VERSION = f"transformers {transformers.__version__}"
VOCABULARY, LENGTH, LIMIT, CLOSE = 64, 12, 4_000_000, 1e-4

# What the numbers of a configuration become, by name; the first that fits. Others stay.
SIZES = [
    (r"vocab_size|num_tokens$|_vocab$", VOCABULARY),
    (r"head_dim|v_head|qk_head|qk_rope|d_kv$|attention_head_size|kv_channels|d_head", 8),
    (r"^(num_)?(key_value_heads|kv_heads)$|num_key_value|n_kv|kv_heads|num_query_groups|n_head_kv", 2),
    (r"num_.*heads|n_heads?$|attention_heads$|^heads$|nheads|num_head", 4),
    (r"(num|n)_?.*(layers|blocks)$|n_layers?$|_layers$|^depths?$|num_layer", 2),
    (r"intermediate|ffn|inner|mlp_dim|d_ff|feedforward|ff_size", 48),
    (r"expert.*per_tok|top_?k|n_group|num_selected", 2),
    (r"num_.*experts|n_routed|moe_num", 4),
    (r"max_position|n_positions|max_.*positions|max_seq_len|n_ctx|max_source|max_target", 64),
    (r"image_size|img_size|input_size$", 32),
    (r"patch_size", 8),
    (r"lora_rank|latent", 16),
    (r"hidden_size|d_model|n_embd|embed_dim|_dim$|^dim$|embedding_size|^width$|proj_size|d_embed|_channels$", 32),
]
UNCHANGED = ("num_channels", "in_channels", "in_chans", "num_mel_bins")
GIVEN = ("rope_parameters", "rope_scaling", "id2label", "label2id", "task_specific_params")
DROPPED = ("transformers_version", "_name_or_path", "architectures", "model_type", "dtype", "torch_dtype")


def small(name: str, value):
    """A value of a configuration, made small."""
    if isinstance(value, dict):
        return value if name in GIVEN else {k: small(k, v) for k, v in value.items()}
    if isinstance(value, float) and re.search(r"dropout|_pdrop$|drop_rate|attn_drop|layerdrop", name):
        return 0.0
    if isinstance(value, (list, tuple)) and name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        return [*value[:1], *value[-1:]]
    if isinstance(value, (list, tuple)):
        return [small(name, x) if isinstance(x, int) else x for x in value]
    if isinstance(value, bool) or not isinstance(value, int) or name in UNCHANGED:
        return value
    if re.search(r"_(id|index)$", name):
        return min(value, VOCABULARY - 1 - len(name) % 9)
    return next((min(value, size) if value > 0 else value for way, size in SIZES if re.search(way, name)), value)


@functools.cache
def configuration(kind: str):
    """Small, to be copied."""
    cls = CONFIG_MAPPING[kind]
    given = {k: v for k, v in cls().to_dict().items() if k not in DROPPED}
    return cls(**{k: small(k, v) for k, v in given.items()})


def classes(kind: str) -> list[type[PreTrainedModel]]:
    """The models of a type: those that the auto classes make, else those in its package that take its configuration."""
    config = CONFIG_MAPPING[kind]
    found = []
    for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        with contextlib.suppress(ValueError):  # an entry that names no model
            found.append(mapping.get(config, None))
    found = [x for x in found if isinstance(x, type)]
    package = importlib.import_module(config.__module__.rpartition(".")[0])
    for path in () if found else sorted(Path(package.__file__).parent.glob("modeling_*.py")):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(f"{package.__name__}.{path.stem}")
            found += [
                x
                for x in vars(module).values()
                if isinstance(x, type)
                and issubclass(x, PreTrainedModel)
                and x.config_class is config
                and "forward" in vars(x)
                and x.__module__ == module.__name__
            ][:2]
    return list(dict.fromkeys(found))


def build(cls: type[PreTrainedModel], kind: str, implementation: str) -> PreTrainedModel:
    """With weights that make attention sharp, the same for each implementation."""
    torch.manual_seed(0)
    config = copy.deepcopy(configuration(kind))
    model = cls._from_config(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
            else:
                std = 1.0 if "embed" in name and weight.dim() == 2 else 1.5 / weight[0].numel() ** 0.5
                nn.init.normal_(weight, std=std, generator=generator)
    return model


def inputs(model: PreTrainedModel, side: str | None) -> dict[str, torch.Tensor]:
    """What the forward pass of a model asks for, as far as its parameters tell; padding on a side of the second row."""
    asked = inspect.signature(model.forward).parameters
    config, generator = model.config, torch.Generator().manual_seed(1)
    sizes = getattr(config, "vision_config", config)
    ids = torch.randint(1, VOCABULARY - 12, (2, LENGTH), generator=generator)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if side:
        mask[1, slice(4) if side == "left" else slice(LENGTH - 4, None)] = 0
    edge = getattr(sizes, "image_size", None) or 32
    edge = edge if isinstance(edge, (list, tuple)) else (edge, edge)
    noise = {
        "pixel_values": (2, getattr(sizes, "num_channels", None) or 3, *edge),
        "input_values": (2, 2000),
        "input_features": (2, getattr(config, "num_mel_bins", None) or 80, 64),
    }
    given = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    given |= {"attention_mask": mask} if side else {}
    given |= {"inputs_embeds": torch.randn(2, LENGTH, 32, generator=generator)} if "input_ids" not in asked else {}
    for name, shape in noise.items():
        if "input_ids" not in asked or model.main_input_name == name:
            given[name] = torch.randn(shape, generator=generator)
    if "pixel_values" in asked:
        given.pop("inputs_embeds", None)
    return {name: value for name, value in given.items() if name in asked}


def tensors(out) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out] if out.is_floating_point() else []
    if isinstance(out, ModelOutput):
        out = [value for name, value in out.items() if "past" not in name and "cache" not in name]
    return [x for part in out for x in tensors(part)] if isinstance(out, (list, tuple)) else []


@torch.no_grad()
def run(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The float outputs at real positions; with padding, no other outputs."""
    torch.manual_seed(0)  # some models draw
    out, mask = tensors(model(**given)), given.get("attention_mask")
    return out if mask is None else [x[mask.bool()] for x in out if x.shape[:2] == mask.shape]


def off(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference, as a part of the largest value of its output."""
    assert [x.shape for x in actual] == [x.shape for x in expected]
    ratios = [
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item()
        for a, b in zip(actual, expected, strict=True)
        if a.numel()
    ]
    return max((float("inf") if x != x else x for x in ratios), default=0.0)


def why(error: Exception) -> str:
    """The kind of a refusal."""
    assert isinstance(error, ValueError), repr(error)
    assert re.search("attn_implementation|a mask per head", str(error)), str(error)
    for words in ("table of its own", "does not go through", "a mask per head", "head size"):
        if words in str(error):
            return words
    return re.search(r"does not support (\w+)", str(error))[1]


def outcome(cls: type[PreTrainedModel], kind: str, calls: list) -> str | None:
    """ "served", why not, or None for what does not run small with eager attention either."""
    try:
        if not recorded() and too_large(cls, kind):
            return None
        eager = build(cls, kind, "eager")
        given = {side: inputs(eager, side) for side in (None, "right", "left")}
        expected = {side: run(eager, x) for side, x in given.items()}
    except Exception:  # of any sort: the sizes do not fit
        return None
    if not any(x.isfinite().all() for x in expected[None]):
        return None
    calls.clear()
    try:
        model = build(cls, kind, "dkv")
        found = {side: run(model, x) for side, x in given.items()}
    except ValueError as error:
        return why(error)
    for side in given:
        part = off(found[side], expected[side])
        if part >= CLOSE and side is None and looks_ahead(eager, given[side], expected[side]):
            # A decoder that makes no mask at all: only its flag keeps later tokens from it, and eager has no flag.
            part = off(found[side], run(build(cls, kind, "sdpa"), given[side]))
            assert part < CLOSE, f"{cls.__name__} without a mask is off sdpa by {part:.2g}"
            return "as sdpa"
        assert part < CLOSE, f"{cls.__name__} with padding {side} is off by {part:.2g}"
    if not calls:
        return "never called" if any("Attention" in type(x).__name__ for x in model.modules()) else "no attention"
    if looks_ahead(model, given[None], found[None]):
        assert looks_ahead(eager, given[None], expected[None]), f"{cls.__name__} sees a later token"
    return "served"


def too_large(cls: type[PreTrainedModel], kind: str) -> bool:
    with torch.device("meta"):
        model = cls._from_config(copy.deepcopy(configuration(kind)))
    return sum(x.numel() for x in model.parameters()) > LIMIT


def looks_ahead(model: PreTrainedModel, given: dict[str, torch.Tensor], out: list[torch.Tensor]) -> bool:
    """Whether another last token changes what is said of those before it; `out` is what the model says of `given`."""
    name = next((x for x in ("decoder_input_ids", "input_ids") if x in given), None)
    if name is None:
        return True
    ids = given[name].clone()
    ids[:, -1] = ids[:, -1] % (VOCABULARY - 13) + 1
    before, after = (
        [x[:, :-1] for x in outs if x.shape[:2] == ids.shape] for outs in (out, run(model, given | {name: ids}))
    )
    return off(after, before) > 1e-6


@functools.cache
def recorded() -> dict[str, str]:
    """Outcomes by class of models, if they were recorded with this version of transformers and are not to be now."""
    if os.environ.get("DKV_RECORD"):
        return {}
    version, *lines = RECORD.read_text().splitlines()
    return dict(line.split(": ") for line in lines) if version == VERSION else {}


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Counts how often the attention is called."""
    seen, real = [], hf.attention

    def counted(module, *args, **kwargs):
        seen.append(type(module))
        return real(module, *args, **kwargs)

    dkv.register()
    transformers.AttentionInterface.register(hf.NAME, counted)
    yield seen
    dkv.register()


@pytest.mark.slow
@pytest.mark.parametrize("letter", sorted({kind[0] for kind in CONFIG_MAPPING}))
def test_equals_eager_or_is_refused(letter, calls):
    outcomes, faults = {}, []
    known = {name: x for name, x in recorded().items() if name[0] == letter}
    kinds = {name.split()[0] for name in known} if recorded() else {x for x in CONFIG_MAPPING if x[0] == letter}
    for kind in sorted(kinds):
        for cls in classes(kind):
            name = f"{kind} {cls.__name__}"
            if recorded() and name not in known:
                continue
            try:
                outcomes[name] = outcome(cls, kind, calls)
            except AssertionError as error:
                faults.append(f"{kind}: {error}")
    assert not faults
    outcomes = {name: x for name, x in outcomes.items() if x is not None}
    assert "never called" not in outcomes.values(), outcomes
    if recorded():
        assert outcomes == known
    if os.environ.get("DKV_RECORD"):
        write(letter, outcomes)


def write(letter: str, outcomes: dict[str, str]) -> None:
    version, *lines = RECORD.read_text().splitlines()
    kept = [line for line in lines if line[0] != letter and version == VERSION]
    lines = sorted([*kept, *(f"{name}: {x}" for name, x in outcomes.items())], key=lambda line: line.split(": ")[0])
    RECORD.write_text("\n".join([VERSION, *lines]) + "\n")


@pytest.mark.parametrize("kind", ["llama", "mistral", "bert", "opt"])
def test_the_comparison_finds_a_module_that_is_believed(kind, calls, monkeypatch):
    """Attention that takes every missing flag and mask for what it is not."""
    monkeypatch.setattr(hf, "_is_causal", lambda module, asked: kind == "bert")
    with pytest.raises(AssertionError, match="is off"):
        outcome(classes(kind)[0], kind, calls)
