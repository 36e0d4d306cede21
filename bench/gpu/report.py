"""How long `dkv.bench.gpu` may take, and where its results go."""

import time
from typing import Any

import torch

from dkv.bench.timing import synchronise
from dkv.common import files


class Clock:
    """The time that a part may take."""

    def __init__(self, minutes: float):
        self.start, self.limit = time.monotonic(), minutes * 60

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    @property
    def over(self) -> bool:
        return self.spent >= self.limit


class Report:
    """Rows of every part, printed as they come, and written to a file after each.

    Args:
        path: JSON file, replaced as a whole after every row; what cannot be replaced, such as a FIFO, is written once,
            by `close`. None: none.
        known: `facts` and settings of the run.
    """

    def __init__(self, path: str | None, known: dict[str, Any]):
        self.path, self.failed = path, False
        self.content: dict[str, Any] = {"facts": known, "finished": False, "parts": {}}
        self.save()

    def begin(self, part: str, title: str, **more: Any) -> None:
        self.part = self.content["parts"][part] = {"rows": [], "left_out": [], "seconds": 0.0, **more}
        print(f"\n== {part}: {title}", flush=True)

    def row(self, line: str, values: dict[str, Any], failed: bool = False) -> None:
        """Print `line` and record `values`; `failed` makes the run fail."""
        self.failed |= failed
        self.part["rows"].append(values)
        print(line, flush=True)
        self.save()

    def end(self, clock: Clock, left_out: list[str]) -> None:
        self.part["left_out"], self.part["seconds"] = left_out, round(clock.spent, 1)
        print(f"-- {clock.spent:.0f} s")
        if left_out:
            shown = "; ".join(left_out[:8]) + ("; ..." if len(left_out) > 8 else "")
            print(f"-- time is up (--minutes {clock.limit / 60:g}): {len(left_out)} left out: {shown}", flush=True)
        self.save()

    def close(self, finished: bool) -> None:
        self.content["finished"] = finished
        if self.path is not None:
            files.write_json(self.path, self.content, indent=1)

    def kept(self) -> str:
        """What a stopped run leaves."""
        kept = self.path is not None and not files.is_stream(self.path)
        return f"what was measured so far is in {self.path}" if kept else ""

    def save(self) -> None:
        if self.path is not None and not files.is_stream(self.path):
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
