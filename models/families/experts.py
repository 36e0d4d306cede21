"""What the families with mixtures have in common: the names of experts, and the fields that count them."""

from collections.abc import Callable
from typing import Any

from dkv.models.mixture import Mixture
from dkv.models.spec import ModelSpec

MLP = ("gate_proj", "up_proj", "down_proj")


def names(shared: str | None = None, mlp: str = "model.layers.{}.mlp") -> dict[str, str | tuple[str, ...]]:
    """Below the MLP of a layer: the router, the experts, and the shared one, if there is one, under its name."""
    inside = "layers.{}.experts"
    found: dict[str, str | tuple[str, ...]] = {
        f"{inside}.router": f"{mlp}.gate",
        f"{inside}.gate_up": (f"{mlp}.experts.{{}}.gate_proj", f"{mlp}.experts.{{}}.up_proj"),
        f"{inside}.down": (f"{mlp}.experts.{{}}.down_proj",),
    }
    return found | ({} if shared is None else {f"{inside}.shared.{part}": f"{mlp}.{shared}.{part}" for part in MLP})


def more(rest: Callable[[ModelSpec, Mixture], dict[str, Any]]) -> Callable[[ModelSpec], dict[str, Any]]:
    """As `Family.more`: the number of experts, and the `rest`, which differs; nothing of a spec without experts, which
    these formats cannot express."""

    def written(spec: ModelSpec) -> dict[str, Any]:
        found = spec.mixture
        if found is None:
            return {}
        return {"num_experts": found.experts, "num_experts_per_tok": found.chosen, **rest(spec, found)}

    return written
