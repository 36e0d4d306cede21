"""How far a long work has come: a bar in a terminal, lines elsewhere, both on standard error."""

import sys
import time

from tqdm import tqdm

from dkv.common import process

# Seconds between two lines where what is counted is small.
PAUSE = 5.0


def counted(number: int, what: str) -> str:
    """A number of things, as "1 pass" and "2 passes"."""
    plural = what if number == 1 else f"{what}es" if what.endswith(("s", "ch")) else f"{what}s"
    return f"{number} {plural}"


class Bar(tqdm):
    """Count what is done.

    Args:
        total: how many there are.
        unit: the word for one.
        pause: least seconds between two lines, `PAUSE` by default; 0: a line for each.
        silent: show nothing.

    Example:
        >>> with Bar(len(runs), "run", pause=0) as bar:
        ...     for run in runs:
        ...         bar.set_description(run.name)
        ...         run()
        ...         bar.update()
    """

    def __init__(self, total: int, unit: str, pause: float | None = None, silent: bool = False):
        # None: where there is a terminal.
        super().__init__(total=total, unit=unit, leave=False, disable=silent or None, file=sys.stderr)
        # tqdm keeps no unit where it shows nothing.
        self.unit, self.pause, self.silent = unit, PAUSE if pause is None else pause, silent
        self.began = self.said = time.monotonic()

    def update(self, n: int = 1) -> None:
        """So many more are done."""
        if not self.disable:
            super().update(n)
        elif not self.silent:
            self.n += n
            self._say()

    def _say(self) -> None:
        now = time.monotonic()
        if now - self.said >= self.pause:
            self.said = now
            what = getattr(self, "desc", "").removesuffix(": ")
            done = f"{self.n} of {counted(self.total, self.unit)}{f' ({what})' if what else ''}"
            spent = now - self.began
            left = f", about {spent / self.n * (self.total - self.n):.0f} s left" if 0 < self.n < self.total else ""
            process.say(f"{process.name()}: {done}, {spent:.0f} s{left}")

    def print(self, line: str) -> None:
        """Print a line at once, above the bar."""
        self.write(line)
        sys.stdout.flush()
