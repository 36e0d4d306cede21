"""The names of experts, which the families with mixtures have in common."""

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
