"""The eager baseline of the block policies: generation that costs what Fast-dLLM's published code costs.

Own code, after the rules in `tests/golden/README.md` and a reading of NVlabs/Fast-dLLM. It gives the tokens of
`dkv.generate` and keeps the work that dkv leaves out: logits of every slot of a pass and a float64 softmax of them,
keys kept unrotated and all rotated again in every pass, and one more pass where the full one has filled its block.
"""

import torch
from torch import Tensor

import dkv
from dkv.bench.baselines.forward import forward
from dkv.engine.config import DiffusionConfig
from dkv.models import Transformer
from dkv.policies import Policy


@torch.no_grad()
def generate(
    model: Transformer,
    input_ids: Tensor,
    *,
    new: int,
    block_length: int,
    cache: Policy,
    threshold: float | None = None,
) -> tuple[Tensor, int]:
    """Continue one prompt; the tokens are those of `dkv.generate` with the same settings.

    Args:
        model: of LLaDA's kind, its weights in `nn.Linear`.
        input_ids: integers [1, P].
        new: slots to fill.
        block_length: slots of a block.
        cache: `NoCache()`, `PrefixCache()` or `DualCache()`.
        threshold: fill all slots that are at least so sure; None: one slot a pass.

    Returns:
        int64 [1, P + new], and the number of passes.
    """
    if len(input_ids) != 1:
        raise ValueError(f"input_ids must be one row, as in the published code, got {len(input_ids)}")
    mask_id, width = model.spec.mask_token_id, input_ids.shape[1]
    x = torch.cat((input_ids, input_ids.new_full((1, new), mask_id)), 1)
    length, passes, cached = x.shape[1], 0, not isinstance(cache, dkv.NoCache)
    rope = tuple(torch.cat((table, table), -1)[:length] for table in model.rope_tables(length))
    plan = DiffusionConfig(max_new_tokens=new, block_length=block_length).plan(shifted=False)
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    for block in (step for step in plan if step.in_block == 0):
        start, stop = width + block.start, width + block.stop
        begin, end, full, again = 0, length, True, True
        while again:

            def join(layer: int, *fresh: Tensor, begin: int = begin, end: int = end) -> tuple[Tensor, ...]:
                """Keys and values of all slots, in their order."""
                if begin == 0:
                    kept[layer] = fresh
                elif end == length:
                    return tuple(torch.cat((old[:, :begin], t), 1) for old, t in zip(kept[layer], fresh, strict=True))
                else:
                    for old, t in zip(kept[layer], fresh, strict=True):
                        old[:, begin:end] = t
                return kept[layer]

            logits = forward(model, x[:, begin:end], join, tuple(t[begin:end] for t in rope), rope)
            _fill(x[:, begin:end], logits, mask_id, stop - begin, threshold)
            passes += 1
            again = (full and cached) or bool((x[:, start:stop] == mask_id).any())
            full = False
            if cached:
                begin, end = start, stop if isinstance(cache, dkv.DualCache) else length
    return x, passes


def _fill(x: Tensor, logits: Tensor, mask_id: int, stop: int, threshold: float | None) -> None:
    """Fill the surest masks of x [1, N] before `stop`, in place."""
    probability = logits.double().softmax(-1)
    logits[..., mask_id] = -torch.inf
    guess = logits.argmax(-1)
    open_ = x == mask_id
    open_[:, stop:] = False
    sure = torch.where(open_, probability.gather(-1, guess.unsqueeze(-1)).squeeze(-1), -torch.inf)[0]
    order = sure.topk(int(open_.sum()) if threshold is not None else min(1, int(open_.sum()))).indices
    chosen = [slot for number, slot in enumerate(order) if number == 0 or sure[slot] >= threshold]
    if chosen:
        x[0, torch.stack(chosen)] = guess[0, torch.stack(chosen)]
