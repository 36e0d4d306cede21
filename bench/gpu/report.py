"""How long a part of `dkv.bench.gpu` may take, and where its results go."""

import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

from dkv.bench.timing import synchronise
from dkv.common import files

Item = TypeVar("Item")


class Report:
    """Rows of every part, printed as they come, and written to a file after each.

    Args:
        path: JSON file, replaced as a whole after every row; what cannot be replaced, such as a FIFO, is written once,
            by `close`. None: none.
        known: `facts` and settings of the run.
        minutes: the time of every part.
        only: what the name of an item has to contain.
    """

    def __init__(self, path: str | None, known: dict[str, Any], minutes: float = 9, only: str = ""):
        self.path, self.minutes, self.only, self.failed = path, minutes, only.lower(), False
        self.content: dict[str, Any] = {"facts": known, "finished": False, "parts": {}}
        self._save()

    def begin(self, part: str, title: str, **more: Any) -> None:
        self.start, self.left_out = time.monotonic(), []
        self.part = self.content["parts"][part] = {"rows": [], "left_out": self.left_out, "seconds": 0.0, **more}
        print(f"\n== {part}: {title}", flush=True)

    @property
    def spent(self) -> float:
        """Seconds since the part began."""
        return time.monotonic() - self.start

    @property
    def limit(self) -> float:
        """Seconds that a part may take."""
        return 60 * self.minutes

    def wanted(self, name: str) -> bool:
        return self.only in name.lower()

    def items(self, named: Iterable[tuple[str, Item]]) -> Iterator[tuple[str, Item]]:
        """The wanted ones, until the time is over; the others are noted as left out."""
        for name, item in named:
            if not self.wanted(name):
                continue
            if self.spent >= self.limit:
                self.left_out.append(name)
            else:
                yield name, item

    def row(self, line: str, values: dict[str, Any], failed: bool = False) -> None:
        """Print `line` and record `values`; `failed` makes the run fail."""
        self.failed |= failed
        self.part["rows"].append(values)
        print(line, flush=True)
        self._save()

    def end(self) -> None:
        self.part["seconds"] = round(self.spent, 1)
        print(f"-- {self.spent:.0f} s")
        if count := len(self.left_out):
            shown = "; ".join(self.left_out[:8]) + ("; ..." if count > 8 else "")
            print(f"-- time is up (--minutes {self.minutes:g}): {count} left out: {shown}", flush=True)
        self._save()

    def close(self, finished: bool) -> None:
        self.content["finished"] = finished
        if self.path is not None:
            files.write_json(self.path, self.content, indent=1)

    def kept(self) -> str:
        """What a stopped run leaves."""
        return f"what was measured so far is in {self.path}" if self._replaceable else ""

    @property
    def _replaceable(self) -> bool:
        return self.path is not None and not files.is_stream(self.path)

    def _save(self) -> None:
        if self._replaceable:
            files.write_json(self.path, self.content, indent=1)


def short(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


class DeviceLost(Exception):
    """The device no longer answers; nothing that follows in this process would mean anything."""


def must_answer(device: torch.device, after: str) -> None:
    """Raise DeviceLost unless the device works: after an illegal access every later call of the process fails."""
    try:
        synchronise(device)
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        advice = "run the rest in a new process (--only NAME)"
        raise DeviceLost(f"the device no longer answers after {after}; {advice}") from error
