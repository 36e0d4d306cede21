"""The loop of transformers on the same weights, given our random numbers: batches whose rows finish and end apart."""

from pathlib import Path

import pytest
import torch

import dkv
from dkv.engine.denoise import numbers
from dkv.engine.noise import text_keys

FOLDER = Path(__file__).parents[2] / "golden" / "families" / "diffusion_gemma" / "gemma_tiny"
SLOTS, VOCABULARY = 8, 192


class Dealer:
    """Our random numbers in the order in which the loop of transformers asks for its own."""

    def __init__(self, keys, steps: int):
        self.keys, self.steps, self.canvas, self.step = keys, steps, -1, 0

    def randint(self, **_):
        if self.begins():
            self.canvas, self.step = self.canvas + 1, 0
            self.numbers = numbers(self.keys, self.canvas, self.steps, SLOTS, VOCABULARY)
            return self.numbers.start
        self.step += 1
        return self.numbers.renewed[self.step - 1]

    def begins(self) -> bool:
        """A canvas begins where no tokens were drawn since the last random ones."""
        drawn, self.drawn = getattr(self, "drawn", False), False
        return not drawn

    def multinomial(self, p, num_samples):
        self.drawn = True
        sums, uniform = p.cumsum(-1), self.numbers.uniform[self.step].view(-1, 1)
        return torch.searchsorted(sums, uniform * sums[:, -1:], right=True).clamp(max=VOCABULARY - 1)


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers", minversion="5.24")
    return transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.mark.parametrize("stability", [0, 1])
@pytest.mark.parametrize("lengths", [(9,), (12, 5, 20)])
def test_the_same_tokens(theirs, monkeypatch, lengths, stability):
    torch.manual_seed(len(lengths))
    width = max(lengths)
    ids, mask = torch.randint(2, 190, (len(lengths), width)), torch.ones(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : width - length] = 0
    how = {"max_new_tokens": 32, "max_denoising_steps": 7, "t_min": 0.1, "t_max": 0.3, "confidence_threshold": 1.2}
    how |= {"eos_token_id": list(range(2, 8)), "pad_token_id": 0, "stability_threshold": stability}
    found = dkv.generate(dkv.wrap(theirs), ids, mask, **how, entropy_bound=3.0, seed=4)
    texts = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    dealer = Dealer(text_keys(texts, [4] * len(lengths)), how["max_denoising_steps"])
    monkeypatch.setattr(torch, "randint", dealer.randint)
    monkeypatch.setattr(torch, "multinomial", dealer.multinomial)
    module = pytest.importorskip("transformers.models.diffusion_gemma.generation_diffusion_gemma")
    bound = module.EntropyBoundSamplerConfig(entropy_bound=3.0)
    expected = theirs.generate(ids, attention_mask=mask, **how, sampler_config=bound)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.sequences.shape[1] > width + SLOTS
