"""The eager baseline of the block policies: generation that costs what the code of Fast-dLLM and Streaming-dLLM costs.

Own code, after the rules in `tests/golden` and a reading of NVlabs/Fast-dLLM, from which the other one comes. It gives
the tokens of `dkv.generate` and keeps the work that dkv leaves out: logits of every slot of a pass and a float64
softmax of them, keys kept unrotated and all rotated again in every pass, and in Fast-dLLM one more pass where the full
one has filled its block.
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
    threshold_decay: float = 0.0,
) -> tuple[Tensor, int]:
    """Continue one prompt; the tokens are those of `dkv.generate` with the same settings.

    Args:
        model: of LLaDA's kind, its weights in `nn.Linear`.
        input_ids: integers [1, P].
        new: slots to fill.
        block_length: slots of a block.
        cache: `NoCache()`, `PrefixCache()`, `DualCache()` or `SuffixWindow()`.
        threshold: fill all slots that are at least so sure; None: one slot a pass.
        threshold_decay: how far the threshold falls while a block fills.

    Returns:
        int64 [1, P + new], and the number of passes.
    """
    if len(input_ids) != 1:
        raise ValueError(f"input_ids must be one row, as in the published code, got {len(input_ids)}")
    mask_id, width = model.spec.mask_token_id, input_ids.shape[1]
    x = torch.cat((input_ids, input_ids.new_full((1, new), mask_id)), 1)
    length, passes, cached = x.shape[1], 0, not isinstance(cache, dkv.NoCache)
    # Fast-dLLM makes one pass more where the full one has filled its block.
    more = cached and not isinstance(cache, dkv.SuffixWindow)
    rope = tuple(torch.cat((table, table), -1)[:length] for table in model.rope_tables(length))
    plan = DiffusionConfig(max_new_tokens=new, block_length=block_length).plan(shifted=False)
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    for block in (step for step in plan if step.in_block == 0):
        start, stop = width + block.start, width + block.stop
        seen = _seen(cache, stop, length)
        own = tuple(table[seen] for table in rope)
        begin, end, full, again = 0, len(seen), True, True
        while again:

            def join(layer: int, *fresh: Tensor, begin: int = begin, end: int = end) -> tuple[Tensor, ...]:
                """Keys and values of all slots that are seen, in their order."""
                if begin == 0:
                    kept[layer] = fresh
                elif not isinstance(cache, dkv.DualCache):
                    return tuple(torch.cat((old[:, :begin], t), 1) for old, t in zip(kept[layer], fresh, strict=True))
                else:
                    for old, t in zip(kept[layer], fresh, strict=True):
                        old[:, begin:end] = t
                return kept[layer]

            tokens = x[:, seen[begin:end]]
            masks = float((tokens == mask_id).float().mean())
            bound = threshold if full or threshold is None else threshold * (1 - threshold_decay * (1 - masks))
            logits = forward(model, tokens, join, tuple(t[begin:end] for t in own), own)
            _fill(tokens, logits, mask_id, stop - begin, bound)
            x[:, seen[begin:end]] = tokens
            passes += 1
            again = (full and more) or bool((x[:, start:stop] == mask_id).any())
            full = False
            if cached:
                begin, end = start, stop if isinstance(cache, dkv.DualCache) else len(seen)
    return x, passes


def _seen(cache: Policy, stop: int, length: int) -> Tensor:
    """The slots that the passes of a block see, int64 [n]; the block ends before `stop`."""
    slots = torch.arange(length)
    if not isinstance(cache, dkv.SuffixWindow) or length - stop <= cache.window:
        return slots
    return torch.cat((slots[: stop + cache.window], slots[max(length - cache.tail, stop + cache.window) :]))


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
