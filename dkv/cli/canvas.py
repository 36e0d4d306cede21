"""The options of `dkv generate` that are of models which denoise canvases, DiffusionGemma."""

import argparse
from typing import Any

OPTIONS = {
    "max_denoising_steps": (int, "N", "passes over a canvas at most"),
    "t_min": (float, "T", "the temperature falls to this"),
    "t_max": (float, "T", "from this"),
    "stability_threshold": (int, "N", "a canvas is finished once its best tokens are those of N steps before"),
    "confidence_threshold": (float, "H", "and their mean entropy is below H nats"),
}


def add_canvas(parser: argparse.ArgumentParser) -> None:
    """Add the options; they say nothing of their defaults, which are those of the model."""
    about = "Of DiffusionGemma alone, and the defaults are the model's own; --entropy-bound and --seed act, too."
    add = parser.add_argument_group("canvas", about).add_argument
    for name, (kind, metavar, says) in OPTIONS.items():
        add(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=says)


def canvas_settings(args: argparse.Namespace, canvases: bool) -> dict[str, Any]:
    """The settings that the options ask for; `canvases`: of a model that denoises canvases, whose ends are known."""
    given = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    return {**given, "eos_token_id": []} if canvases and args.raw else given
