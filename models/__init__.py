"""Diffusion language models: one transformer, a thin adapter per family, and a loader."""

from dkv.models.loader import load, wrap
from dkv.models.packing import unpack
from dkv.models.spec import ModelSpec
from dkv.models.tokenizer import load_tokenizer
from dkv.models.transformer import Transformer

__all__ = ["ModelSpec", "Transformer", "load", "load_tokenizer", "unpack", "wrap"]
