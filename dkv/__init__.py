"""dkv: diffusion language models with cached keys and values.

>>> import dkv
>>> model, tokenizer = dkv.load("tiny"), dkv.load_tokenizer("tiny")
>>> prompt = "+2 -3 +1 +1 -2 +3 +1 -1 -1 +2 -3 +3 +1 +1 -2 -2 +1 +3 -1 -1 +2="
>>> ids = tokenizer(prompt, return_tensors="pt").input_ids
>>> output = dkv.generate(model, ids.to(model.device), max_new_tokens=64, cache=dkv.DecodeCache(refresh=8))
>>> tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)
"""

# Nothing slow: until the first module of the command line runs, nobody can handle an interrupt.
import os
from importlib import import_module

from dkv.version import __version__

# In a source checkout the sub-packages stand beside this folder, not inside it.
_root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if os.path.isfile(os.path.join(_root, "kernels", "__init__.py")):
    __path__.append(_root)

# Public names by module. Imported at first use, so that `import dkv` is quick and takes no device.
_MODULES = {
    "dkv.models": "load load_tokenizer wrap unpack",
    "dkv.engine.generate": "generate infill stream",
    "dkv.tools.gaps": "fill_gaps Gap",
    "dkv.engine.config": "DiffusionConfig",
    "dkv.engine.output": "DiffusionOutput Stats",
    "dkv.engine.graphs": "release_graphs",
    "dkv.tools.streaming": "DraftStreamer",
    "dkv.core.kv_cache": "KVCache",
    "dkv.policies": (
        "NoCache DecodeCache GreedyCache PrefillCache PrefillDecodeCache PrefixCache DualCache "
        "SuffixWindow SlidingCache Rollout ElasticCache SkipCache"
    ),
    "dkv.kernels": "use_backend",
    "dkv.integrations.hf_attention": "register",
    "dkv.serving.llm": "LLM Full",
    "dkv.serving.mapping": "map",
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    if name == "parallel":
        return import_module("dkv.parallel")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dkv' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
