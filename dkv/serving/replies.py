"""Answers and errors in the form of OpenAI's interface."""

import json
import time
import uuid
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

# Of a message to a client; what was asked may be in it.
MOST_SAID = 500
# By what is asked: how an id begins, and the kind of an answer and of a piece of it.
KINDS_OF_REPLY = {
    "talk": ("chatcmpl", "chat.completion", "chat.completion.chunk"),
    "prompt": ("cmpl", "text_completion", "text_completion"),
    "infill": ("infill", "infill", "infill"),
}
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """Why a request is not answered, as the client is told.

    Args:
        status: of HTTP.
        message: one sentence.
        param: the field that is wrong.
        code: a name that programs may go by.
        headers: of the response.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        message = str(self)
        message = message if len(message) <= MOST_SAID else f"{message[:MOST_SAID]} ..."
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


class Reply:
    """The objects of one answer, whole or in pieces.

    Args:
        model: its name.
        kind: of what was asked, one of `KINDS_OF_REPLY`.
        usage: in pieces, the last one tells it.
    """

    def __init__(self, model: str, kind: str, usage: bool = False):
        begin, self._kind, self._kind_of_piece = KINDS_OF_REPLY[kind]
        self._chat, self._usage = kind == "talk", usage
        self._about = {"id": f"{begin}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, written: Sequence[Any], usage: dict[str, int]) -> dict[str, Any]:
        """The whole answer, of what was `written` for each choice: its text, and why it ended."""
        choices = []
        for number, one in enumerate(written):
            said = {"message": {"role": "assistant", "content": one.text}} if self._chat else {"text": one.text}
            choices.append({"index": number, **said, **one.more})
            choices[-1] |= {"logprobs": self._logprobs(one.logprobs), "finish_reason": one.finish}
        return {**self._about, "object": self._kind, "choices": choices, "usage": usage}

    def _logprobs(self, tokens: list[tuple[str, float]] | None) -> dict[str, Any] | None:
        """How likely the tokens were, as it is told in a talk or of a prompt."""
        if tokens is None:
            return None
        if self._chat:
            content = [
                {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
                for text, logprob in tokens
            ]
            return {"content": content}
        texts, logprobs = [text for text, _ in tokens], [logprob for _, logprob in tokens]
        offsets = list(accumulate(map(len, texts), initial=0))[:-1]
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}

    def begin(self, number: int) -> str | None:
        """The first piece of a choice, if it has one of its own."""
        return self._piece(number, {"role": "assistant", "content": ""}, None) if self._chat else None

    def piece(self, number: int, text: str, finish: str | None, draft: dict[str, Any] | None = None) -> str:
        """A piece of the text of a choice; with the last one, why it ended. A draft stands in a field of our own."""
        return self._piece(number, {"content": text} if text else {}, finish, text, draft)

    def _piece(
        self, number: int, delta: dict[str, str], finish: str | None, text: str = "", draft: dict | None = None
    ) -> str:
        said = {"delta": delta} if self._chat else {"text": text}
        own = {} if draft is None else {"dkv": draft}
        return self._event([{"index": number, **said, "logprobs": None, "finish_reason": finish, **own}], None)

    def end(self, usage: dict[str, int]) -> str:
        """What comes after all pieces."""
        return (self._event([], usage) if self._usage else "") + "data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> str:
        told = {"usage": usage} if self._usage else {}
        return event({**self._about, "object": self._kind_of_piece, "choices": choices, **told})


def event(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def usage(prompt: int, completion: int) -> dict[str, int]:
    """What was read and written, in tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
