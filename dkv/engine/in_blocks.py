"""What a block-causal model makes of the settings: how its blocks are counted, and its schedule."""

from torch import Tensor

from dkv.core.blocks import BlockRule, slot_schedule
from dkv.core.schedule import Step
from dkv.core.sequences import Sequences
from dkv.engine import speculation
from dkv.engine.config import DiffusionConfig
from dkv.models.spec import ModelSpec
from dkv.policies import NoCache

# Settings that have no meaning in such a model, and why.
REFUSED = {
    "schedule": "its blocks are a part of the model",
    "most": "its blocks do not slide",
    "cfg_scale": "no such model has been published with guidance",
    "threshold_decay": "masks behind the block are not seen",
    "certainty": "what stands behind the block is not seen",
}

# Why a policy does not go with such a model, which stores finished blocks for good and sees nothing behind the current
# one, and what does in its place.
POLICIES_REFUSED = {
    "prefill": 'what it spares, the prompt, is stored anyway: use "none"',
    "pd": 'what it spares at a refresh, the prompt, is stored anyway: use "decode"',
    "prefix": 'it computes the block and all behind it, of which nothing is seen: use "none"',
    "suffix": 'it hides what stands far behind the block, of which nothing is seen: use "none"',
    "sliding": 'its region slides over the bounds of blocks, which are a part of the model: use "decode"',
    "greedy": 'its windows of masks are laid over the whole answer, and a block has few of them: use "decode"',
    "rollout": 'it looks for slots all over the text, and those before the block never change: use "decode"',
    "elastic": 'it finds out when the text before the block changes, which it never does: use "decode"',
    "skip": 'a slot that stops inside the network would be stored with what it had before: use "dual"',
}


def block_rule(spec: ModelSpec, config: DiffusionConfig | None = None) -> BlockRule | None:
    """How the blocks of a model are counted; None: every slot sees all."""
    if spec.attention == "full":
        return None
    length, causal = spec.block_length or config.block_length, spec.attention == "prefix_causal"
    return BlockRule(length, spec.blocks_from_prompt, spec.seeded, causal)


def check(spec: ModelSpec, config: DiffusionConfig) -> None:
    """Raise ValueError where a setting does not go with a block-causal model."""
    speculation.check(spec, config)
    if spec.attention == "full":
        if config.edit_threshold is not None:
            raise ValueError("edit_threshold goes with block-causal models, whose finished blocks stay")
        return
    length, part = spec.block_length, config.block_length
    if length is None and part is None:
        raise ValueError(
            "block_length is needed: the configuration of this model does not say in which blocks it was trained"
        )
    if length is not None and part is not None and length % part:
        raise ValueError(
            f"block_length={part} must divide the blocks of the model, {length} slots each, of which it is a part: "
            "give one that does, or load the model with attention_block="
        )
    for name, why in REFUSED.items():
        value = getattr(config, name)
        if value and value not in ("blocks", "speculative"):
            raise ValueError(f"{name}={value!r} does not go with a block-causal model: {why}")
    if not config.cache.in_blocks:
        raise ValueError(
            f"cache {config.cache.name!r} does not go with a block-causal model: {POLICIES_REFUSED[config.cache.name]}"
        )
    if config.edit_threshold is not None:
        _check_edits(spec, config)


def _check_edits(spec: ModelSpec, config: DiffusionConfig) -> None:
    """An edited block needs outputs of its own slots, at all of them, in every pass."""
    if spec.shifted or spec.seeded or spec.blocks_from_prompt:
        raise ValueError(
            "edit_threshold goes with models whose outputs are those of their own slots, and whose blocks are counted "
            "from slot 0 (LLaDA2.1)"
        )
    if config.block_length is not None and config.block_length != block_rule(spec, config).length:
        raise ValueError(f"edit_threshold edits whole blocks: leave block_length={config.block_length} out")
    if not isinstance(config.cache, NoCache):
        raise ValueError(
            f"edit_threshold needs all slots of a block in every pass: leave cache={config.cache.name!r} out"
        )
    if config.is_ordered:
        raise ValueError(f"edit_threshold needs a confidence to go by, and confidence={config.confidence!r} has none")


def extras(spec: ModelSpec, config: DiffusionConfig, prompts: Tensor, budgets: list[int]) -> list[int]:
    """How many slots behind the answer of each row are filled with it, as they end its last block.

    Args:
        prompts: bool [B, P], real tokens.
        budgets: new tokens, by row.
    """
    return [extra(spec, config, prompt, new) for prompt, new in zip(prompts.sum(1).tolist(), budgets, strict=True)]


def extra(spec: ModelSpec, config: DiffusionConfig, prompt: int, new: int) -> int:
    """The same of one row, by the tokens of its prompt and its new ones."""
    rule = block_rule(spec, config)
    if rule is None:
        return 0
    if config.schedule == "speculative":
        return spec.block_length
    # An edited row has a mask of its own for not being finished.
    edited = config.edit_threshold is not None and new > 0
    return rule.extra(prompt, new) + edited


def plans_of(config: DiffusionConfig, rows: Sequences, rule: BlockRule | None, shifted: bool) -> list[list[Step]]:
    """The schedules of all rows."""
    if rule is None:
        return [config.plan(shifted, row, count) for row, count in enumerate(rows.to_fill)]
    part, plans, edits = config.block_length or rule.length, [], config.edit_threshold is not None
    for row, (masked, size) in enumerate(zip(rows.masked.cpu(), rows.row_lengths, strict=True)):
        slots = masked.nonzero().squeeze(1).tolist()
        plans.append(
            slot_schedule(slots, size, rule, part, config.of_row("steps", row), config.quotas == "rounded", edits)
        )
    return plans
