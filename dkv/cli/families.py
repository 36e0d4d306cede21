"""The options of `dkv generate` that are of some families alone: models with blocks, and DiffusionGemma."""

import argparse
from collections.abc import Mapping
from typing import Any

# Their kind, default and help. Of `dkv.DiffusionConfig`, whose defaults they have.
BLOCKS = {
    "edit_threshold": (float, None, "P", "a filled slot of the block takes another token that is more probable than P"),
    "post_steps": (int, 16, "N", "passes at most that edit a block without masks (default: %(default)s)"),
    "quotas": (str, "equal", "KIND", "equal shares of a block in its steps, or rounded (default: %(default)s)"),
}
CANVAS = {
    "max_denoising_steps": (int, None, "N", "passes over a canvas at most"),
    "t_min": (float, None, "T", "the temperature falls to this"),
    "t_max": (float, None, "T", "from this"),
    "stability_threshold": (int, None, "N", "a canvas is finished once its best tokens are those of N steps before"),
    "confidence_threshold": (float, None, "H", "and their mean entropy is below H nats"),
}


def add_families(parser: argparse.ArgumentParser) -> None:
    """Add the options; those of canvases say nothing of their defaults, which are those of the model."""
    add_blocks(parser)
    about = "Of DiffusionGemma alone, and the defaults are the model's own; --entropy-bound and --seed act, too."
    _add(parser, CANVAS, "canvas", about)


def add_blocks(parser: argparse.ArgumentParser) -> None:
    """Add the options of models with blocks alone."""
    _add(parser, BLOCKS, "models with blocks", "LLaDA2.1 edits tokens, A2D rounds its quotas.")


def _add(parser: argparse.ArgumentParser, options: Mapping[str, tuple], title: str, about: str) -> None:
    add = parser.add_argument_group(title, about).add_argument
    for name, (kind, default, metavar, says) in options.items():
        add(f"--{name.replace('_', '-')}", type=kind, default=default, metavar=metavar, help=says)


def own_settings(args: argparse.Namespace, spec: Any) -> dict[str, Any]:
    """What the options of canvases ask for, and --raw of a model that ends rows by itself."""
    given = {name: value for name in CANVAS if (value := getattr(args, name)) is not None}
    return {**given, "eos_token_id": []} if spec.attention != "full" and args.raw else given
