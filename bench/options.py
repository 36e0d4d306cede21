"""What `dkv bench` measures: a model, a canvas, and cache policies in turn."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dkv
from dkv.bench.lineup import BLOCKED, COMPARED, RULES, SERVED
from dkv.bench.problems import Exam, bundled
from dkv.bench.shapes import as_loaded, random_model, shape
from dkv.models import Transformer
from dkv.models.keywords import usable
from dkv.models.loader import FLOATS

# The model that has problems with one right answer.
TINY, PROBLEMS = "tiny", 24


@dataclass(frozen=True)
class Options:
    """A measurement.

    Attributes:
        name: of the shape or checkpoint.
        model: as `dkv.load` gives it.
        eager: the same weights unpacked, for the baseline in eager PyTorch; the model itself where nothing
            is packed; None: no baseline.
        prompt, new, batch: tokens of a prompt, slots to fill, rows.
        steps: passes; None: one per slot.
        rounds: timed runs of every contender, in turn, after one that is not timed.
        policies: names in `dkv.bench.lineup.LINEUP`, "plain" first.
        blocked: the same for those that are compared in blocks.
        served: names of those that requests are served with.
        rules: names in `dkv.bench.lineup.RULES`, of block policies; a threshold has no effect on random weights.
        exam: problems with one right answer, whose prompts take the place of seeded ids; None: there are none.
    """

    name: str
    model: Transformer
    eager: Transformer | None
    prompt: int = 128
    new: int = 128
    batch: int = 1
    steps: int | None = None
    rounds: int = 3
    policies: tuple[str, ...] = COMPARED
    blocked: tuple[str, ...] = BLOCKED
    served: tuple[str, ...] = SERVED[:1]
    rules: tuple[str, ...] = tuple(RULES)
    exam: Exam | None = None

    def prompts(self) -> Tensor:
        """int64 [batch, prompt]: the first problems, or seeded ids, the mask not among them."""
        if self.exam is not None:
            ids, _ = self.exam.encoded()
            return ids[torch.arange(self.batch) % len(ids)]
        spec, draw = self.model.spec, torch.Generator().manual_seed(1)
        ids = torch.randint(spec.vocab_size - 1, (self.batch, self.prompt), generator=draw)
        return (ids + (ids >= spec.mask_token_id)).to(self.model.device)

    def facts(self) -> dict[str, Any]:
        """What a figure is about, beside the machine: the model and its weights."""
        model = self.model
        known = {"model": self.name, "parameters": model.num_parameters}
        return known | {"dtype": str(model.dtype).removeprefix("torch."), "packed": _packed(model)}


def of_shape(
    name: str,
    layers: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    *,
    eager: bool = True,
    **settings: Any,
) -> Options:
    """A model of random weights.

    Args:
        name, layers: as for `dkv.bench.shapes.shape`.
        device: default: the current GPU, or else the CPU.
        dtype: default: float32 on a CPU, bfloat16 elsewhere.
        eager: also measure the eager baseline.
        settings: further attributes of `Options`.

    Raises:
        ValueError: an unknown shape or dtype, or a device that cannot be used.
    """
    spec, place = shape(name, layers), usable(device)
    kind = dtype or ("float32" if place.type == "cpu" else "bfloat16")
    if kind not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(FLOATS)}, got {kind!r}")
    plain = random_model(spec, place, FLOATS[kind])
    title = name if layers is None else f"{name}, {layers} layer{'s' * (layers > 1)}"
    return Options(title, as_loaded(plain), plain if eager else None, **settings)


def of_checkpoint(
    path_or_id: str, device: str | None = None, dtype: str | None = None, *, eager: bool = True, **settings: Any
) -> Options:
    """A checkpoint; the bundled "tiny" with its problems, all others with seeded ids.

    Args:
        path_or_id, device, dtype: as for `dkv.load`.
        eager, settings: as for `of_shape`.

    Raises:
        FileNotFoundError, ValueError: what `dkv.load` raises.
        ValueError: fewer slots than an answer of "tiny" needs.
    """
    model = dkv.load(path_or_id, dtype=dtype, device=device)
    if path_or_id == TINY:
        (problems,) = bundled(["balance"], PROBLEMS)
        exam = Exam(model, dkv.load_tokenizer(TINY), problems)
        settings = {"new": problems.new, **settings, "exam": exam, "prompt": exam.encoded()[0].shape[1]}
        longest = max(map(len, problems.answers))
        if settings["new"] < longest:
            raise ValueError(
                f"--new must be at least {longest} with {TINY}, the length of its answers, got {settings['new']}; or "
                "give a --shape"
            )
    plain = None
    if eager:
        again = _packed(model)
        plain = dkv.load(path_or_id, dtype=model.dtype, device=model.device, pack=False) if again else model
    return Options(path_or_id, model, plain, **settings)


def _packed(model: Transformer) -> bool:
    return any(hasattr(module, "packed") for module in model.modules())
