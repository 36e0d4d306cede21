"""How long a part of `dkv.bench.gpu` may take, and where its results go."""

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch

from dkv.bench.timing import synchronise
from dkv.common import files

Item, Found = TypeVar("Item"), TypeVar("Found")


class Report:
    """Rows of every part, printed as they come, and written to a file after each.

    Args:
        path: JSON file, replaced as a whole after every row; what cannot be replaced, such as a FIFO, is written once,
            by `close`. None: none.
        known: `facts` and settings of the run.
        until: when the parts have to end, by `time.monotonic`.
        only: what the name of an item has to contain.
        share: (i, n), every n-th of the wanted items, from the i-th on: the others are somebody else's.
    """

    def __init__(
        self,
        path: str | None,
        known: dict[str, Any],
        until: float = float("inf"),
        only: str = "",
        share: tuple[int, int] = (0, 1),
    ):
        self.path, self.until, self.only, self.share, self.failed = path, until, only.lower(), share, False
        self.content: dict[str, Any] = {"facts": known, "finished": False, "parts": {}}
        self.save()

    def begin(self, part: str, title: str, **more: Any) -> None:
        self.start, self.left_out = time.monotonic(), []
        self.part = self.content["parts"][part] = {"rows": [], "left_out": self.left_out, "seconds": 0.0, **more}
        if self.share[0] == 0:
            print(f"\n== {part}: {title}", flush=True)

    @property
    def spent(self) -> float:
        """Seconds since the part began."""
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        """Seconds until the parts have to end."""
        return self.until - time.monotonic()

    def wanted(self, name: str) -> bool:
        return self.only in name.lower()

    def items(self, named: Iterable[tuple[str, Item]]) -> Iterator[tuple[str, Item]]:
        """The wanted ones, until the time is over; the others are noted as left out."""
        wanted = (item for item in named if self.wanted(item[0]))
        for name, item in islice(wanted, self.share[0], None, self.share[1]):
            if self.left <= 0:
                self.left_out.append(name)
            else:
                yield name, item

    def row(self, line: str, values: dict[str, Any], failed: bool = False) -> None:
        """Print `line` and record `values`; `failed` makes the run fail."""
        self.failed |= failed
        self.part["rows"].append(values)
        print(line, flush=True)
        self.save()

    def attempt(self, name: str, device: torch.device, call: Callable[[], Found]) -> Found | None:
        """What `call` returns. An error becomes a row with its traceback; short memory is no failure of ours.

        Raises:
            DeviceLost: the device no longer answers.
        """
        try:
            return call()
        except Exception as error:
            failed = not isinstance(error, torch.OutOfMemoryError)
            self.row(f"{name:44} {short(error)}", {"name": name, **in_full(error)}, failed)
        # Here the error is gone, and with it what its frames held of the device's memory.
        must_answer(device, name)
        return None

    def end(self) -> None:
        self.part["seconds"] = round(self.spent, 1)
        if self.share[1] == 1:
            print(f"-- {self.spent:.0f} s")
        if count := len(self.left_out):
            shown = "; ".join(self.left_out[:8]) + ("; ..." if count > 8 else "")
            print(f"-- time is up: {count} left out: {shown}", flush=True)
        self.save()

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

    def save(self) -> None:
        """Write what there is, if it can be replaced later on."""
        if self._replaceable:
            files.write_json(self.path, self.content, indent=1)


def short(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def in_full(error: BaseException) -> dict[str, str]:
    """An error as it is written: in one line, and where it was raised."""
    return {"error": short(error), "traceback": "".join(traceback.format_exception(error))}


class DeviceLost(Exception):
    """The device no longer answers; nothing that follows in this process would mean anything."""


def must_answer(device: torch.device, after: str) -> None:
    """Raise DeviceLost unless the device works: after an illegal access every later call of the process fails."""
    try:
        synchronise(device)
        torch.ones(1, device=device).item()
    except torch.OutOfMemoryError:
        return
    except RuntimeError as error:
        advice = "run the rest in a new process (--only NAME)"
        raise DeviceLost(f"the device no longer answers after {after}; {advice}") from error
