"""The page of a server: a generation is asked for, and seen while it runs."""

import base64
import hashlib
import html
from pathlib import Path
from typing import Any

from dkv.policies import POLICIES
from dkv.serving.protocol import Served
from dkv.tools import trace
from dkv.tools.trace.record import label

PARTS = Path(__file__).parent
# Settings that have a field of the page, whose value at the server is shown there.
SHOWN = ("max_new_tokens", "block_length", "steps", "threshold", "temperature", "top_p")


def page(served: Served, has_key: bool) -> tuple[str, dict[str, str]]:
    """The page in one HTML file, and its headers.

    Args:
        served: what is asked.
        has_key: clients have to name a key.
    """
    style = trace.joined(trace.PARTS / "page.css", PARTS / "page.css")
    script = trace.joined(trace.PARTS / "base.js", trace.PARTS / "map.js", PARTS / "canvas.js", PARTS / "page.js")
    text = trace.filled(
        PARTS / "page.html",
        title=html.escape(f"dkv serve: {served.name}"),
        name=html.escape(served.name),
        style=style,
        script=script,
        data=trace.embedded(_about(served, has_key)),
    )
    # Nothing but what stands in the page itself, and the server that it came from.
    rules = (
        *("default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"),
        *("frame-ancestors 'none'", f"style-src 'sha256-{_hash(style)}'", f"script-src 'sha256-{_hash(script)}'"),
    )
    headers = {
        "Content-Security-Policy": "; ".join(rules),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return text, headers


def _about(served: Served, has_key: bool) -> dict[str, Any]:
    """What the page knows of the server."""
    given = served.config.settings()
    return {
        "model": served.name,
        "max_length": served.max_length,
        "chat": bool(getattr(served.tokenizer, "chat_template", None)),
        "key": has_key,
        "policy": label(served.config.cache),
        "policies": list(POLICIES),
        "settings": {name: given[name] for name in SHOWN},
        # Elsewhere blocks may begin in front of the answer.
        "counts_blocks": served.spec.attention == "full",
        "blocks": [],
    }


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
