"""Recorded runs of published code: `MODEL/cases/NAME.json` with their settings and facts, and tensors beside it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


class Mismatch(Exception):
    """A recorded value that was not reproduced."""


@dataclass(frozen=True)
class Case:
    """A recorded run: its name, settings and facts, and tensors read on demand."""

    folder: Path
    name: str
    facts: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        return self.facts["settings"]

    @property
    def tensors(self) -> dict[str, Tensor]:
        path = self.folder / "cases" / f"{self.name}.safetensors"
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path.name} cannot be read: {error}") from error

    @property
    def defect(self) -> str | None:
        """Why the run documents a fault of the published code and is not to be reproduced."""
        if self.facts.get("informational"):
            return "the published run divides by a row without logits (NaN)"
        if self.facts.get("mask_token_predictions"):
            return "the published run emits the mask token, which dkv never does"
        if self.facts.get("policy") == "rollout" and self.facts.get("published"):
            return "the published run has two slips, which the runs called mended put right"
        return None


def find_cases(folder: Path) -> list[Case]:
    """The cases of a model folder, or of all model folders below one.

    Raises:
        FileNotFoundError: there are none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    paths = sorted(folder.glob("**/cases/*.json"))
    if not paths:
        raise FileNotFoundError(f"no recorded runs in {folder}: expected MODEL/config.json and MODEL/cases/*.json")
    return [Case(path.parent.parent, path.stem, json.loads(path.read_text())) for path in paths]


def compare(what: str, found: Tensor, expected: Tensor, step: int) -> None:
    """Raise Mismatch at the first value that differs, of tokens or sets [..., B, L] after a step; before B: layers."""
    if found.shape != expected.shape:
        raise Mismatch(f"step {step}: {what} of shape {list(found.shape)}, recorded {list(expected.shape)}")
    if not torch.equal(found, expected):
        at = tuple((found != expected).nonzero()[0].tolist())
        place = ", ".join(f"{name} {i}" for name, i in zip(("layer", "row", "column")[-len(at) :], at, strict=True))
        here, recorded = found[at].item(), expected[at].item()
        raise Mismatch(f"step {step}, {place}: {what} {here}, recorded {recorded}")
