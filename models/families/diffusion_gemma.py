"""DiffusionGemma: google/diffusiongemma-*. Gemma 4 as causal encoder and as denoiser of a canvas; text only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dkv.models.families import fields
from dkv.models.families.base import Family, Piece
from dkv.models.gemma_spec import GemmaLayer, GemmaSpec

SLIDING, FULL = "sliding_attention", "full_attention"
# By kind of layer: the rotation where the file names none, and the kind of rotation that is implemented.
ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25},
}
SCALAR = "model.encoder.language_model.layers.{}.layer_scalar"


@dataclass(frozen=True)
class GemmaFamily(Family):
    """A family whose configuration has a part for the text, and whose layers are of two kinds."""

    def spec(self, config: Mapping) -> GemmaSpec:
        """As `Family.spec`."""
        text = fields.value(config, "text_config", {})
        fields.check(isinstance(text, Mapping), "text_config", text, "an object is needed")
        fields.only(self.switches, text)
        vocabulary = fields.count(text, "vocab_size")
        ends, pads = (
            fields.listed_ids(config, name, vocabulary) or fields.listed_ids(text, name, vocabulary) or [usual]
            for name, usual in (("eos_token_id", 1), ("pad_token_id", 0))
        )
        sizes = {name: fields.count(text, field) for field, name in self.fields.items() if name in SIZES}
        return GemmaSpec(
            self.name,
            **sizes,
            layers=tuple(_layers(text)),
            norm_eps=fields.positive(text, "rms_norm_eps", 1e-6),
            softcap=fields.positive(text, "final_logit_softcapping", 30.0),
            block_length=fields.count(config, "canvas_length", 256),
            max_positions=fields.count(text, "max_position_embeddings", 131072),
            ends=tuple(ends),
            pad_token_id=pads[0],
            generation=fields.value(config, "generation_config", {}),
        )

    def config(self, spec: GemmaSpec) -> dict[str, Any]:
        """ValueError: not written."""
        raise ValueError("a DiffusionGemma model is not exported: save it with transformers")

    def pieces(self, parameters: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
        """As `Family.pieces`; behind the number of a layer the names are those of the file."""
        found = {}
        for name, shape in parameters.items():
            part, _, rest = name.partition(".")
            theirs = SCALAR.format(rest) if part == "encoder_scalars" else f"{self.names[part]}.{rest}"
            found[theirs] = [Piece(name, (), shape)]
        return found


def _layers(text: Mapping) -> list[GemmaLayer]:
    count = fields.count(text, "num_hidden_layers")
    kinds = fields.names(text, "layer_types") or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(count)]
    fields.check(len(kinds) == count, "layer_types", kinds, f"num_hidden_layers={count} of them are needed")
    # As in the published class, whatever the file says.
    kinds[-1] = FULL
    fields.check(set(kinds) <= {*ROPE}, "layer_types", kinds, f"only {' and '.join(ROPE)} are implemented")
    own = text.get("per_layer_config")
    if own is None:
        wide = {"head_dim": text.get("global_head_dim", 512)}
        own = {FULL: wide | {"num_key_value_heads": text.get("num_global_key_value_heads")}}
    fields.check(isinstance(own, Mapping), "per_layer_config", own, "an object is needed")
    rope = fields.value(text, "rope_parameters", {})
    made = []
    for index, kind in enumerate(kinds):
        here = {**text, **{k: v for k, v in (own.get(str(index)) or own.get(kind) or {}).items() if v is not None}}
        turn = ROPE[kind] | {k: v for k, v in (rope.get(kind) or {}).items() if v is not None}
        fields.only({"rope_type": ROPE[kind]["rope_type"], "factor": 1.0}, turn)
        share = fields.positive(turn, "partial_rotary_factor", 1.0)
        fields.check(share == 1 or (kind == FULL and share < 1), "partial_rotary_factor", share, "1, or less in full")
        heads = fields.count(here, "head_dim", 256), fields.count(here, "num_key_value_heads")
        window = fields.count(text, "sliding_window", 512) if kind == SLIDING else None
        made.append(GemmaLayer(*heads, window, fields.positive(turn, "rope_theta", 10000.0), share))
    return made


FAMILY = GemmaFamily(
    name="diffusion_gemma",
    model_types=("diffusion_gemma",),
    architectures=("DiffusionGemmaForBlockDiffusion",),
    fields={same: same for same in ("vocab_size", "hidden_size", "intermediate_size", "num_experts")}
    | {"num_attention_heads": "num_heads", "top_k_experts": "chosen_experts", "moe_intermediate_size": "expert_size"}
    | {"tie_word_embeddings": "tied_head"},
    defaults=lambda config: {},
    # "vision" reads text from left to right.
    switches={
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": "vision",
    },
    written={},
    copies={},
    usual_ids={},
    names={
        "embed": "model.decoder.embed_tokens",
        "norm": "model.decoder.norm",
        "head": "lm_head",
        "layers": "model.decoder.layers",
        "self_conditioning": "model.decoder.self_conditioning",
    },
    # Images, and the weights that encoder and head share with the decoder.
    unused=r"^model\.encoder\.(vision_tower|embed_vision|language_model)\.|^lm_head\.|(inv_freq|embed_scale)$",
)
SIZES = {*FAMILY.fields.values()} - {"tied_head"}
