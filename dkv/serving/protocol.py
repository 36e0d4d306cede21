"""What a client may ask: the bodies of OpenAI's interface, and the settings of a generation beside its fields."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

from dkv.core.naming import instead
from dkv.engine.config import DiffusionConfig
from dkv.engine.generate import config_of
from dkv.engine.settings import DEFAULTS
from dkv.policies import POLICY_OPTIONS, joined_policy
from dkv.serving.checked import RECORDS
from dkv.serving.prompts import prompts_of, talk_of
from dkv.serving.replies import Refusal
from dkv.serving.written import Written
from dkv.tools.text import end_ids

MOST_STOPS, LONGEST_STOP = 4, 256
COMMON = ("model", "n", "user", "metadata")
CONTINUED = (*COMMON, "stream", "stream_options", "draft", "logprobs", "stop", "max_tokens")
# What a talk and a prompt have of their own.
OWN = {True: ("messages", "max_completion_tokens"), False: ("prompt",)}
# Settings that are the server's, or have a field of OpenAI's name.
KEPT = ("max_new_tokens", "max_length", "eos_token_id", "eot_token_id", "pad_token_id", "mask_token_id", "vocab_limit")
SETTINGS = tuple(name for name in (*DEFAULTS, *POLICY_OPTIONS) if name not in (*KEPT, *RECORDS))
# Fields of OpenAI's that nothing here answers to, with the values that change nothing.
INERT: Mapping[str, tuple] = MappingProxyType(
    {
        "best_of": (1,),
        "echo": (False,),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "top_logprobs": (0,),
        "suffix": ("",),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "store": (False,),
        "service_tier": ("auto", "default"),
    }
)


@dataclass(frozen=True)
class Served:
    """The model as clients see it.

    Attributes:
        name: by which they ask for it.
        tokenizer, spec: of the model.
        config: settings of requests that do not say otherwise.
        max_length: slots of a prompt and its answer.
        max_choices: answers to one request.
        max_body: bytes of one request.
    """

    name: str
    tokenizer: Any
    spec: Any
    config: DiffusionConfig
    max_length: int
    max_choices: int = 16
    max_body: int = 1 << 20

    @property
    def ends(self) -> list[int]:
        """Ids that end a text."""
        return end_ids(self.tokenizer, self.spec) or []


@dataclass(frozen=True)
class Asked:
    """One request, checked.

    Attributes:
        prompts: ids of each.
        configs: settings of every choice: those of the first prompt, then those of the next.
        stops: strings that end an answer.
        stream, usage: whether it is told in pieces, the last one with what was read and written.
        draft: whether every piece has the whole draft.
        logprobs: whether it is told how likely each token was.
    """

    prompts: list[list[int]]
    configs: list[DiffusionConfig]
    stops: list[str] = field(default_factory=list)
    stream: bool = False
    usage: bool = False
    draft: bool = False
    logprobs: bool = False

    @property
    def choices(self) -> list[tuple[list[int], DiffusionConfig]]:
        """Prompt and settings of every choice."""
        n = len(self.configs) // len(self.prompts)
        return [(self.prompts[number // n], config) for number, config in enumerate(self.configs)]

    @property
    def how(self) -> dict[str, bool]:
        """Further arguments of `LLM.add`."""
        return {"logprobs": self.logprobs}

    @property
    def read(self) -> int:
        """Tokens that are given."""
        return sum(map(len, self.prompts))

    def written(self, served: Served) -> list[Any]:
        """By choice what makes text of its tokens, a `Written` or what is used alike."""
        return [Written(served.tokenizer, served.ends, self.stops) for _ in self.configs]


def fields_of(body: bytes) -> dict[str, Any]:
    """The fields of a body, without those that are null.

    Raises:
        Refusal: it is no JSON object.
    """
    try:
        fields = json.loads(body, parse_constant=lambda name: _raise(ValueError(f"{name} is no number of JSON")))
        # Halves of surrogate pairs can be written in JSON, and are no text.
        json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        said = "strings must be text" if isinstance(error, UnicodeEncodeError) else str(error)
        raise Refusal(400, f"the body must be JSON: {said}") from None
    if not isinstance(fields, dict):
        raise Refusal(400, f"the body must be a JSON object, got {type(fields).__name__}")
    return {name: value for name, value in fields.items() if value is not None}


def asked(fields: dict[str, Any], chat: bool, served: Served) -> Asked:
    """Check what is asked.

    Args:
        fields: of `fields_of`.
        chat: of a talk, or of prompts.

    Raises:
        Refusal: of the first fault that is found.
    """
    check_names(fields, (*CONTINUED, *OWN[chat]), served)
    n, stream = whole_of(fields, "n", 1, served.max_choices), flag_of(fields, "stream")
    draft, stops = flag_of(fields, "draft"), _stops(fields.get("stop"))
    if draft and not stream:
        raise Refusal(400, "a draft is told in the pieces of a stream: ask for stream as well", "draft")
    prompts = [talk_of(fields, served)] if chat else prompts_of(fields, served)
    check_count(len(prompts), n, served)
    limit = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    new = whole_of(fields, limit, served.config.of_row("max_new_tokens", 0), served.max_length)
    for ids in prompts:
        if len(ids) + new > served.max_length:
            raise Refusal(
                400,
                f"a prompt of {len(ids)} tokens and {new} new ones are {len(ids) + new}, and this server takes at most "
                f"{served.max_length} together",
                limit,
                "context_length_exceeded",
            )
    configs = configs_of(fields, served, len(prompts) * n, partial(_continued, new=new))
    options = fields.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise Refusal(400, "stream_options must be an object with include_usage", "stream_options")
    return Asked(prompts, configs, stops, stream, flag_of(options, "include_usage"), draft, _logprobs(fields, chat))


def check_names(fields: dict[str, Any], known: Sequence[str], served: Served) -> None:
    """Raise a refusal of a field that is not known, beside the settings, and of another model."""
    known = (*known, *SETTINGS)
    for name, value in fields.items():
        if name in INERT:
            # 0 and False are equal, and so are 0 and 0.0.
            if value not in INERT[name]:
                raise Refusal(400, f"{name} is not supported: leave it out", name, "unsupported_parameter")
        elif name not in known:
            raise Refusal(400, f"unknown field {name!r}: {instead(name, known)}", name, "unknown_parameter")
    if fields.get("model") != served.name:
        given = "model is missing" if "model" not in fields else f"there is no model {fields['model']!r}"
        raise Refusal(404, f"{given}: this server has {served.name!r}", "model", "model_not_found")


def _logprobs(fields: dict[str, Any], chat: bool) -> bool:
    """Whether it is to be told how likely each token was: true in a talk, and 0 others beside it in a completion."""
    given = fields.get("logprobs", False)
    if type(given) is not bool and not (type(given) is int and given == 0 and not chat):
        wanted = "true or false" if chat else "0: how likely other tokens were is not kept"
        raise Refusal(400, f"logprobs must be {wanted}, got {given!r}", "logprobs")
    wants = given is True if chat else given is not False
    if wants and fields.get("stream"):
        raise Refusal(400, "logprobs are told with the whole answer: leave stream out", "logprobs")
    return wants


def check_count(prompts: int, n: int, served: Served) -> None:
    """Raise a refusal of more answers than a request may have."""
    if prompts * n > served.max_choices:
        raise Refusal(400, f"{prompts} prompts with n {n} are more than {served.max_choices} answers", "prompt")


def _continued(given: DiffusionConfig, settings: dict[str, Any], new: int) -> DiffusionConfig:
    return config_of(given, {**settings, "max_new_tokens": new})


def configs_of(
    fields: dict[str, Any], served: Served, count: int, make: Callable[[DiffusionConfig, dict], DiffusionConfig]
) -> list[DiffusionConfig]:
    """The settings of so many choices; of a given seed the following ones for the others.

    Args:
        make: a configuration of that of the server and settings.
    """
    given = {name: value for name, value in fields.items() if name in SETTINGS}
    if "cache" not in given:
        given["cache"] = served.config.to_dict()["cache"]
    if type(given.get("top_p")) in (int, float) and given["top_p"] == 1:
        given["top_p"] = None
    for name in ("seed", "steps"):
        if isinstance(given.get(name), list):
            raise Refusal(400, f"{name} must be one number", name)
    seed = given.pop("seed", None)
    try:
        configs = []
        for number in range(count):
            own = {} if seed is None else {"seed": seed + number if type(seed) is int else seed}
            configs.append(make(served.config, {**joined_policy(given), **own}))
    except (ValueError, TypeError, OverflowError) as error:
        raise Refusal(400, " ".join(str(error).split())) from None
    return configs


def _stops(stop: Any) -> list[str]:
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in stops):
        raise Refusal(400, f"stop must be a text of 1 to {LONGEST_STOP} characters, or a list of these", "stop")
    if len(stops) > MOST_STOPS:
        raise Refusal(400, f"stop may have at most {MOST_STOPS} texts, got {len(stops)}", "stop")
    return stops


def whole_of(fields: Mapping[str, Any], name: str, default: int, most: int) -> int:
    """A whole number from 1 to `most`."""
    value = fields.get(name, default)
    if type(value) is not int or not 1 <= value <= most:
        raise Refusal(400, f"{name} must be a whole number from 1 to {most}, got {value!r}", name)
    return value


def flag_of(fields: Mapping[str, Any], name: str) -> bool:
    """True or false."""
    value = fields.get(name, False)
    if type(value) is not bool:
        raise Refusal(400, f"{name} must be true or false, got {value!r}", name)
    return value


def _raise(error: Exception) -> None:
    raise error
