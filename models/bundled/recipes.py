"""What each bundled model is, and what it is trained on."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, tensor

from dkv.models.bundled.tasks import ALL_TASKS, LONG_TASKS, TASKS
from dkv.models.bundled.text import CHARACTERS, Text
from dkv.models.spec import ModelSpec

# A batch may have so many slots more behind its answers than they need.
SPARE = 64
# Characters of a window of text, and how many of them are to be filled at least.
WINDOW, LEAST_NEW = 384, 128


@dataclass(frozen=True)
class Recipe:
    """A bundled model.

    Attributes:
        spec: its shape.
        alphabet: the characters, whose ids are 0, 1, 2, ...; behind them stand the end token and the mask.
        tasks: what it is trained on, by the names of `ALL_TASKS`, or "text".
    """

    spec: ModelSpec
    alphabet: str
    tasks: Sequence[str]

    @property
    def eos(self) -> int:
        return len(self.alphabet)

    @property
    def mask(self) -> int:
        return len(self.alphabet) + 1

    def encode(self, text: str) -> list[int]:
        return [self.alphabet.index(c) for c in text]

    def batch_of(self, task: str, rng: random.Random, size: int, text: Text | None = None) -> tuple[Tensor, int]:
        """Token ids [size, prompt + new] of fresh problems or windows of the text, and the length of the prompt.

        Half of the canvases are as long as the task's own, the others of any length that holds the answer, both up to
        the end of a block where the model has blocks. Of text the prompt is of any length, or none.
        """
        if task == "text":
            prompt = rng.randrange(WINDOW - LEAST_NEW + 1) if rng.random() < 0.75 else 0
            return tensor([self.encode(text.window(rng, WINDOW)) for _ in range(size)]), prompt
        problems = [ALL_TASKS[task].problem(rng) for _ in range(size)]
        prompt, answer = map(len, problems[0])
        new = ALL_TASKS[task].new_tokens if rng.random() < 0.5 else answer + 1 + rng.randrange(SPARE)
        new += -(prompt + new) % (self.spec.block_length or 1)
        return tensor([self.encode(p + a) + [self.eos] * (new - answer) for p, a in problems]), prompt


def _recipe(family: str, alphabet: str, tasks: Sequence[str], **how: int | float | bool | str) -> Recipe:
    eos = len(alphabet)
    ids = {"vocab_size": eos + 2, "mask_token_id": eos + 1, "eos_token_id": eos, "pad_token_id": eos}
    return Recipe(ModelSpec(family, **ids, **how), alphabet, tasks)


FIGURES = "0123456789+-= .#/"
_SMALL = {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "head_dim": 32, "intermediate_size": 384}
_TEXT = {"hidden_size": 160, "num_layers": 6, "num_heads": 5, "head_dim": 32, "intermediate_size": 448}
_LLADA = {"norm_eps": 1e-5}
_SDAR = {"num_kv_heads": 2, "norm_eps": 1e-6, "qk_norm": True, "rope_float32": False}
_BLOCK = {"attention": "block", "block_length": 32}
_DREAM = {"num_kv_heads": 2, "norm_eps": 1e-6, "qkv_bias": True, "shifted": True, "rope_float32": False}
RECIPES = {
    "tiny": _recipe(
        "llada", FIGURES, tuple(TASKS), num_kv_heads=4, max_positions=512, rope_theta=200.0, **_LLADA, **_SMALL
    ),
    "tiny-dream": _recipe("dream", FIGURES, tuple(TASKS), max_positions=512, rope_theta=200.0, **_DREAM, **_SMALL),
    "tiny-block": _recipe(
        "sdar", FIGURES, tuple(TASKS), max_positions=512, rope_theta=200.0, **_SDAR, **_BLOCK, **_SMALL
    ),
    "tiny-long": _recipe(
        "llada", FIGURES, tuple(LONG_TASKS), num_kv_heads=4, max_positions=1024, rope_theta=200.0, **_LLADA, **_SMALL
    ),
    "tiny-text": _recipe(
        "llada", CHARACTERS, ("text",), num_kv_heads=5, max_positions=1024, rope_theta=1000.0, **_LLADA, **_TEXT
    ),
}
