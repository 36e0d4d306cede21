"""What a cache did in one generation: a record of every step, a heat map of it, and a page to step through it.

>>> from dkv.tools import trace
>>> found = trace.record(model, tokenizer, input_ids, max_new_tokens=64, cache=dkv.DecodeCache(refresh=8))
>>> trace.write_page(found, "trace.html"), trace.write_picture(found, "trace.png")
"""

import base64
import gzip
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dkv.common import files
from dkv.tools.trace import picture
from dkv.tools.trace.record import Trace, record

__all__ = ["Trace", "page", "record", "write_json", "write_page", "write_picture"]

PARTS = Path(__file__).parent


def write_picture(trace: Trace, path: str | Path) -> Path:
    """Write the heat map as a PNG, 150 dpi.

    Raises:
        ValueError: there is no matplotlib.
    """
    figure = picture.figure(trace)
    with files.writing(path) as part:
        figure.savefig(part, dpi=150, format="png")
    return Path(path)


def write_page(trace: Trace, path: str | Path) -> Path:
    """Write a page that shows every step, in one HTML file that needs nothing else."""
    files.write_text(path, page(trace))
    return Path(path)


def write_json(trace: Trace, path: str | Path) -> Path:
    """Write everything as JSON, see `Trace.to_dict`."""
    files.write_json(path, trace.to_dict())
    return Path(path)


def page(trace: Trace) -> str:
    """The page as text."""
    return filled(
        PARTS / "page.html",
        title=html.escape(f"{trace.policy} on {trace.model}"),
        style=joined(PARTS / "page.css"),
        script=joined(*(PARTS / name for name in ("base.js", "map.js", "page.js"))),
        data=embedded(page_data(trace)),
    )


def page_data(trace: Trace) -> dict[str, Any]:
    """What the page knows. Confidences are rounded to bfloat16 (0.4 % of the logarithm), which halves a long page."""
    settings = {n: v for n, v in trace.stats.settings.items() if not n.startswith("output_") and n != "cache"}
    return {
        **{name: getattr(trace, name) for name in ("model", "policy", "steps", "slots", "prompt", "blocks", "texts")},
        "ids": trace.ids.tolist(),
        "decoded": trace.decoded.tolist(),
        "special": np.flatnonzero(trace.special).tolist(),
        "work": trace.work.round(3).tolist(),
        "kinds": _packed(trace.kinds),
        "confidences": _packed(torch.from_numpy(trace.confidences).bfloat16().view(torch.int16).numpy()),
        "rule": trace.stats.settings["confidence"],
        # As text: JavaScript would round a seed of 62 bits.
        "settings": {n: _plain(v) for n, v in {**settings, "seed": trace.stats.seed}.items() if v is not None},
    }


def _plain(value: Any) -> str:
    return ", ".join(f"{n}={v}" for n, v in value.items()) if isinstance(value, dict) else str(value)


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(gzip.compress(values.tobytes(), mtime=0)).decode("ascii")


def joined(*paths: Path) -> str:
    """What stands in these files."""
    return "".join(path.read_text("utf-8") for path in paths)


def filled(template: Path, **parts: str) -> str:
    """The template with a part in the place of every {{name}}."""
    # In one go: what is put in may look like a marker itself.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template.read_text("utf-8"))


def embedded(data: dict[str, Any]) -> str:
    """JSON in ASCII that no token can break out of, inside <script>."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
