"""All figures of measurements. matplotlib (extra `bench`) is imported when a figure is drawn."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dkv.bench.plots.accuracy import answers, drift
from dkv.bench.plots.speed import FIGURES
from dkv.common.files import writing

__all__ = ["FIGURES", "answers", "check_installed", "draw", "drift", "save"]


def check_installed(option: str) -> None:
    """Raise ValueError, naming the option and the remedy, if there is no matplotlib."""
    if find_spec("matplotlib") is None:
        raise ValueError(f"{option} needs matplotlib: pip install 'dkv[bench]'")


def draw(found: dict[str, Any], folder: Path, prefix: str = "") -> list[Path]:
    """Write every figure that the document has data for, as `folder`/PREFIXNAME.png, 150 dpi."""
    figures = {folder / f"{prefix}{name}.png": figure_of(found) for name, figure_of in FIGURES.items()}
    drawn = {path: figure for path, figure in figures.items() if figure is not None}
    for path, figure in drawn.items():
        save(figure, path)
    return list(drawn)


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, 150 dpi."""
    with writing(path) as part:
        figure.savefig(part, dpi=150, format="png")
