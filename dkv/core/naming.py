"""What a message says of a name that nobody knows."""

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name that an unknown one was probably meant to be."""
    near = difflib.get_close_matches(str(name), list(known), 1)
    return near[0] if near else None


def instead(name: object, known: Iterable[str], also: Iterable[str] = ()) -> str:
    """The end of a message: the nearest of `known` and `also`, or else all known ones."""
    known = list(known)
    near = nearest(name, (*known, *also))
    return f"did you mean {near!r}?" if near else f"known are {', '.join(known)}"
