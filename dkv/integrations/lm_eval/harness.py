"""dkv as a model of EleutherAI's lm-evaluation-harness; `dkv.lm_eval` has the command line."""

import copy
import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

import dkv
from dkv.common.bar import Bar
from dkv.core.validation import flag
from dkv.engine import in_blocks
from dkv.engine.config import DiffusionConfig
from dkv.engine.output import Stats
from dkv.integrations.lm_eval.settings import count, stated, task_config
from dkv.models.gemma import Gemma
from dkv.policies import policy_of
from dkv.serving.filling import Asked, answered
from dkv.serving.llm import LLM
from dkv.tools.likelihood import are_greedy, log_likelihoods
from dkv.tools.text import answer, ids_of, padded, starts, turn_end_ids
from dkv.version import versions

# Of lm-eval: not a wish of the user.
DEFAULT_DEVICES = ("cuda", "cuda:0")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """Requests that are generated alike: `members` are their numbers, `seeds` what each has of its own."""

    members: list[int]
    seeds: list[int]
    config: DiffusionConfig
    until: list[str]


class DkvLM(TemplateLM):
    """A diffusion language model for lm-eval: generation, and likelihood by `dkv.tools.likelihood`.

    Args:
        pretrained, dtype, device: as for `dkv.load`. lm-eval's default device, cuda:0, is replaced by
            the CPU where there is none.
        batch_size: prompts that are worked on at a time, masked copies in a pass of a likelihood.
        add_bos_token: begin prompts with the tokenizer's start token if it does not do so itself.
        mc_num: masked copies of an answer, over which its likelihood is a mean.
        is_check_greedy: False: do not find out whether the model itself gives an answer whose likelihood
            is asked for. Few tasks (such as LAMBADA) use it; they then count every answer as wrong.
        settings: of `dkv.DiffusionConfig`, and options of the cache policy, such as `refresh`. What is
            stated here goes before what a task asks for. The seed is lm-eval's (`--seed`) unless stated.

    Raises:
        ValueError: an unknown setting, or an impossible value; before the model is loaded.

    Example:
        >>> lm_eval.simple_evaluate(DkvLM("tiny", cache="decode", refresh=8), tasks=[...])
    """

    def __init__(
        self,
        pretrained: str = "",
        *,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        add_bos_token: bool = False,
        mc_num: int = 128,
        is_check_greedy: bool = True,
        trust_remote_code: bool = False,
        **settings: Any,
    ):
        super().__init__()
        if not pretrained:
            raise ValueError("pretrained is missing: give model_args pretrained=NAME, a folder or a hub id")
        if max_batch_size is not None:
            raise ValueError("max_batch_size goes with batch_size auto, which dkv has not: give batch_size")
        self.batch_size, self.mc_num = count("batch_size", batch_size), count("mc_num", mc_num)
        self.add_bos_token = flag("add_bos_token", add_bos_token)
        self.is_check_greedy = flag("is_check_greedy", is_check_greedy)
        self.stated = stated({"seed": torch.initial_seed() % 2**62, **settings})
        if str(device) in DEFAULT_DEVICES and not torch.cuda.is_available():
            log.warning("no device %s here: using the CPU", device)
            device = "cpu"
        if trust_remote_code:
            log.warning("trust_remote_code has no effect on the model: dkv never runs code of a checkpoint")
        self.pretrained = str(pretrained)
        self.model = dkv.load(self.pretrained, dtype=dtype, device=device)
        policy_of(self.stated.get("cache")).check(self.model.spec.shifted)
        self.tokenizer = dkv.load_tokenizer(self.pretrained)
        self._device = self.model.device
        self.stated.setdefault("eot_token_id", turn_end_ids(self.tokenizer))
        self.generated: dict[str, tuple[int, Stats]] = {}
        self.scored, self.scores, self.truncated = 0, Stats(), 0
        self._adds_bos = bool(starts(self.tokenizer))
        added = self.tokenizer.added_tokens_decoder.items()
        self._special = {token.content: i for i, token in added if token.special}

    @property
    def max_length(self) -> int:
        return self.model.spec.max_positions

    @property
    def eot_token_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        return self.model.spec.eos_token_id if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before an answer without a prompt."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.pretrained.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A talk as one text; without `add_generation_prompt` its last message is left open."""
        if not self.tokenizer.chat_template:
            raise ValueError("the model's tokenizer has no chat template: leave out --apply_chat_template")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, with its start token once, if it is to have one."""
        begun = string if add_special_tokens is False else self._begun(string)
        return ids_of(self.tokenizer, begun, add_special_tokens is not False)

    def _begun(self, text: str) -> str:
        # Chat templates and `add_bos_token` write the start token, and some tokenizers do so again.
        bos = self.tokenizer.bos_token
        if not bos:
            return text
        bare = text.removeprefix(bos)
        return bare if self._adds_bos else bos + bare if self.add_bos_token else text

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A text for each (prompt, settings), cut at the first of its stop strings.

        Raises:
            ValueError: settings that are unknown, or more slots than the model has; before the first pass.
        """
        texts = [""] * len(requests)
        jobs = list(self._jobs(requests))
        with _bar(len(requests), "generate_until", disable_tqdm) as bar:
            for job in jobs:
                for i, tokens in self._generate(requests, job):
                    texts[i] = self._text(tokens, job.until)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                    bar.update()
        return texts

    def _jobs(self, requests: list[Instance]) -> Iterator[_Job]:
        groups: dict[str, list[tuple[int, int]]] = defaultdict(list)
        seen: Counter[tuple[str, str]] = Counter()
        configs: dict[str, tuple[DiffusionConfig, list[str]]] = {}
        for i, request in enumerate(requests):
            prompt, asked = request.args
            key = json.dumps(asked, sort_keys=True, default=str)
            if key not in configs:
                configs[key] = task_config(asked, self.stated, self.model.spec)
            # A request that is repeated asks for another sample, hence for another seed.
            groups[key].append((i, configs[key][0].seed + seen[prompt, key]))
            seen[prompt, key] += 1
        for key, members in groups.items():
            # The order has no influence on a text; long prompts, which take the most memory, come first.
            members.sort(key=lambda member: -len(requests[member[0]].args[0]))
            yield _Job(*map(list, zip(*members, strict=True)), *configs[key])

    def _generate(self, requests: list[Instance], job: _Job) -> Iterator[tuple[int, list[int]]]:
        """The number and the new tokens of each request, as they come; what they cost is noted."""
        prompts = [self.tok_encode(requests[i].args[0]) for i in job.members]
        room = self.max_length - job.config.max_new_tokens
        self._note_truncated(sum(len(ids) > room for ids in prompts))
        prompts = [ids[-room:] for ids in prompts]
        start = time.perf_counter()
        apart = job.config.schedule == "speculative" or isinstance(self.model, Gemma)
        way = self._in_batches if apart else self._in_rows
        stats = replace((yield from way(prompts, job)), seconds=time.perf_counter() - start)
        what = json.dumps({**stats.settings, "seed": None}, sort_keys=True, default=str)
        count, total = self.generated.get(what, (0, Stats(seed=self.stated["seed"], settings=stats.settings)))
        self.generated[what] = (count + len(prompts), _sum(total, stats))

    def _in_rows(self, prompts: list[list[int]], job: _Job) -> Generator[tuple[int, list[int]], None, Stats]:
        """Numbers and new tokens, from rows of which one that ends makes room for the next; returns what they cost."""
        spec, new, filled = self.model.spec, job.config.max_new_tokens, 0
        slots = max(len(ids) + new + in_blocks.extra(spec, job.config, len(ids), new) for ids in prompts)
        room = slots * min(self.batch_size, len(prompts))
        llm = LLM(self.model, max_slots=room, max_length=slots, generation_config=job.config)
        members = zip(job.members, prompts, job.seeds, strict=True)
        for i, found in answered(llm, (Asked(i, ids, {"seed": seed}) for i, ids, seed in members)):
            if isinstance(found, Exception):
                raise found
            filled += found.stats.new_tokens
            yield i, found.tokens.tolist()
        (work,) = llm.work(job.config)
        return replace(work, new_tokens=filled)

    def _in_batches(self, prompts: list[list[int]], job: _Job) -> Generator[tuple[int, list[int]], None, Stats]:
        """The same where no row can be joined, of drafts and of canvases: one batch after the other."""
        config, total = copy.copy(job.config), None
        for start in range(0, len(prompts), self.batch_size):
            place = slice(start, start + self.batch_size)
            ids, mask = (t.to(self.model.device) for t in padded(prompts[place], left=True))
            config.update(seed=job.seeds[place])
            output = dkv.generate(self.model, ids, mask, generation_config=config)
            total = output.stats if total is None else _sum(total, output.stats)
            yield from zip(job.members[place], output.sequences[:, ids.shape[1] :].tolist(), strict=True)
        return total

    def _text(self, ids: list[int], until: list[str]) -> str:
        """New tokens as text, up to the end or the first stop string; that may be a special token."""
        stops = {self._special[stop] for stop in until if stop in self._special}
        ids = ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]
        text = answer(self.tokenizer, self.model.spec, ids)
        return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]

    def _note_truncated(self, count: int) -> None:
        if count:
            self.truncated += count
            log.warning("%d prompts are too long for the model and lose their beginning", count)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether the model itself gives the answer) for each request."""
        start = time.perf_counter()
        # What a prompt is too long by is lost at its beginning.
        over = [max(len(prompt) + len(answer) - self.max_length, 0) for _, prompt, answer in requests]
        self._note_truncated(sum(count > 0 for count in over))
        questions = [(prompt[count:], answer) for (_, prompt, answer), count in zip(requests, over, strict=True)]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with _bar(len(requests) * (1 + self.is_check_greedy), "loglikelihood", disable_tqdm) as bar:
            if self.is_check_greedy:
                for i, given in are_greedy(self.model, questions, batch_size=self.batch_size):
                    found[i] = (0.0, given)
                    bar.update()
            how = {"samples": self.mc_num, "batch_size": self.batch_size, "seed": self.stated["seed"]}
            for i, value in log_likelihoods(self.model, questions, stats=self.scores, **how):
                found[i] = (value, found[i][1])
                self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
                bar.update()
        self.scored += len(requests)
        self.scores.seconds += time.perf_counter() - start
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Perplexity, which a model that fills masks does not have: LLaDA's authors refuse it, too.

        Raises:
            ValueError: always, before anything is computed.
        """
        raise ValueError(
            "a diffusion model has no perplexity token by token: dkv offers generation and multiple choice"
        )

    def get_model_info(self) -> dict[str, Any]:
        """What goes into the `config` of lm-eval's results: work, speed, settings and versions under `dkv`."""
        work = {"passes": self.scores.passes, "seconds": self.scores.seconds}
        likelihood = {"requests": self.scored, "mc_num": self.mc_num, **work}
        # Rows that are taken anew forget how many of their stores were merged.
        generation = [{"requests": n, **s.to_dict(), "merged_stores": None} for n, s in self.generated.values()]
        return {
            "model_num_parameters": self.model.num_parameters,
            "model_dtype": str(self.model.dtype),
            "dkv": {
                "seed": self.stated["seed"],
                "generation": generation,
                "likelihood": likelihood if self.scored else None,
                "truncated_prompts": self.truncated,
                "versions": versions(),
            },
        }


def _sum(total: Stats, more: Stats) -> Stats:
    """The numbers of both together."""
    counts = [f.name for f in fields(Stats) if f.name != "seed" and isinstance(getattr(total, f.name), int | float)]
    return replace(total, **{name: getattr(total, name) + getattr(more, name) for name in counts})


def _bar(total: int, what: str, disable: bool) -> Bar:
    bar = Bar(total, "request", silent=disable)
    bar.set_description(f"Running {what} requests")
    return bar
