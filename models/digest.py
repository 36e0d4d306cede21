"""Which weights a model has, in few characters."""

import hashlib
from typing import Any


def digest(model: Any) -> str:
    """Of the table of embeddings and the norms, which are no different where others are packed or joined."""
    found = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed" in name:
            found.update(parameter.detach().flatten()[:4096].float().cpu().numpy().tobytes())
    return found.hexdigest()
