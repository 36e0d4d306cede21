"""dkv: diffusion language models with cached keys and values.

>>> import dkv
>>> model = dkv.load("tiny")
>>> output = dkv.generate(model, input_ids, max_new_tokens=64, cache=dkv.Decode(refresh=8))
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from dkv.version import __version__

# In a source checkout the sub-packages stand beside this folder, not inside it.
_root = Path(__file__).resolve().parent.parent
if (_root / "kernels" / "reference.py").is_file():
    __path__.append(str(_root))

# Public name -> module. Imported at first use, so that `import dkv` is quick and takes no device.
_PUBLIC = {
    "load": "dkv.models",
    "wrap": "dkv.models",
    "generate": "dkv.generation",
    "infill": "dkv.generation",
    "fill_gaps": "dkv.gaps",
    "Gap": "dkv.gaps",
    "stream": "dkv.generation",
    "DiffusionConfig": "dkv.config",
    "Savings": "dkv.config",
    "DiffusionOutput": "dkv.output",
    "Stats": "dkv.output",
    "DraftStreamer": "dkv.streaming",
    "KVBuffer": "dkv.buffer",
    "NoCache": "dkv.policies",
    "Decode": "dkv.policies",
    "Greedy": "dkv.policies",
    "Prefill": "dkv.policies",
    "PrefillDecode": "dkv.policies",
    "PrefixCache": "dkv.policies",
    "DualCache": "dkv.policies",
    "use_backend": "dkv.kernels",
    "register": "dkv.hf",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dkv' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
