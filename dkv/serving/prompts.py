"""The prompts of a body as token ids."""

from typing import TYPE_CHECKING, Any

from dkv.serving.replies import Refusal
from dkv.tools.text import ids_of

if TYPE_CHECKING:
    from dkv.serving.protocol import Served

ROLES = ("system", "user", "assistant")


def talk_of(fields: dict[str, Any], served: "Served") -> list[int]:
    """The ids of a talk in the tokenizer's chat template."""
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages must be a list of at least one message", "messages")
    if not getattr(served.tokenizer, "chat_template", None):
        raise Refusal(400, "the model's tokenizer has no chat template: ask /v1/completions with a prompt", "messages")
    talk = [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]
    try:
        text = served.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # A template raises what its author liked, mostly about the order of roles.
        raise Refusal(400, f"the chat template does not take these messages: {error}", "messages") from None
    # A template writes the special tokens itself.
    return encoded(served, text, "messages", add_special_tokens=False)


def _message(message: Any, where: str) -> dict[str, str]:
    """Role and text of a message."""
    if not isinstance(message, dict):
        raise Refusal(400, f"{where} must be an object with role and content", "messages")
    message = {name: value for name, value in message.items() if value is not None}
    if unknown := set(message) - {"role", "content", "name"}:
        raise Refusal(400, f"{where} has a field {min(unknown)!r} that is not supported", "messages")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise Refusal(400, f"{where}: role must be one of {', '.join(ROLES)}, got {role!r}", "messages")
    if isinstance(content, list) and all(isinstance(p, dict) and set(p) == {"type", "text"} for p in content):
        content = "".join(p["text"] for p in content if p["type"] == "text" and isinstance(p["text"], str))
    if not isinstance(content, str):
        raise Refusal(400, f"{where}: content must be text, or a list of parts of type text", "messages")
    return {"role": role, "content": content}


def prompts_of(fields: dict[str, Any], served: "Served") -> list[list[int]]:
    """The ids of the prompts: a text, a list of ids, or a list of these."""
    prompt = fields.get("prompt")
    many = isinstance(prompt, list) and not (prompt and all(type(x) is int for x in prompt))
    found = []
    for one in prompt if many else [prompt]:
        if isinstance(one, str):
            found.append(encoded(served, one, "prompt", add_special_tokens=True))
        elif isinstance(one, list) and one and all(type(x) is int for x in one):
            if wrong := [x for x in one if not 0 <= x < served.spec.vocab_size]:
                raise Refusal(400, f"ids must be below {served.spec.vocab_size}, got {wrong[0]}", "prompt")
            found.append(one)
        else:
            raise Refusal(400, "prompt must be a text, a list of token ids, or a list of these", "prompt")
        if len(found) > served.max_choices:
            raise Refusal(400, f"there may be at most {served.max_choices} prompts, got {len(prompt)}", "prompt")
    if not found:
        raise Refusal(400, "prompt is an empty list", "prompt")
    return found


def encoded(served: "Served", text: str, param: str, add_special_tokens: bool) -> list[int]:
    """The ids of a text."""
    try:
        return ids_of(served.tokenizer, text, add_special_tokens)
    except ValueError as error:
        raise Refusal(400, str(error), param) from None
