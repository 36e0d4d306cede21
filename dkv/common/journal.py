"""A file of finished work that only grows, so that whoever was stopped goes on where it was.

Each record is a line of JSON, written in one go. What all of them depend on, their setting, is in a file beside:
records of two settings are never mixed. One process at a time has the file.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from dkv.common import files
from dkv.common.bar import counted

Record = dict[str, Any]
# Bytes that are read at a time to find the end of the last line.
PIECE = 1 << 16


class Journal:
    """The records in a file, which nobody else writes while it is open.

    A process that was killed while it wrote has left a last line without an end: it is cut off, and its work done anew.

    Args:
        path: of the file; its folder is made.
        unit: the word for one record.
        option: of the command that names the folder, for messages.

    Attributes:
        setting: of the records that are there; empty if there are none.

    Raises:
        BlockingIOError: another process has it.
        ValueError: the file is none of a journal.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, unit: str, option: str):
        self.path, self.unit, self.option = path, unit, option
        self._beside = path.with_suffix(".setting.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Never replaced, as the lock is on the file and not on its name.
        self._file: BinaryIO = open(path, "a+b")  # noqa: SIM115
        try:
            _lock(self._file, path)
            _cut_torn_line(self._file)
            self.setting: dict[str, Any] = self._read_setting()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the file."""
        self._file.close()

    def check(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """What is known by now of a setting, plain values as they will be read again.

        Raises:
            ValueError: there are records of another one.
        """
        wanted = json.loads(json.dumps(setting))
        for name in wanted if self.setting else ():
            if self.setting.get(name) != wanted[name]:
                found = f"{name} {self.setting.get(name)!r}, not {wanted[name]!r}"
                raise ValueError(f"{self.path} was made with {found}: give another {self.option}, or remove the file")
        return wanted

    def begin(self, setting: Mapping[str, Any]) -> None:
        """Say what all records depend on, before the first one is added; `check` tells what it raises."""
        wanted = self.check(setting)
        if not self.setting:
            files.write_json(self._beside, wanted, indent=1)
            self.setting = wanted

    def read(self, keep: Callable[[Record], object]) -> None:
        """Hand on every record that is there.

        Raises:
            ValueError: a line is none.
        """
        for number, line in enumerate(self._lines(), 1):
            try:
                keep(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise self._foreign(f"its line {number} is none of its records") from error

    def add(self, record: Record) -> None:
        """Write a record: from now on it is kept, whatever happens to this process."""
        files.append_line(self.path, json.dumps(record))

    @property
    def count(self) -> int:
        """Records that are there: counted, since a signal may come between the writing of one and any note of it."""
        return sum(line.endswith(b"\n") for line in self._lines())

    def kept(self) -> str:
        """What somebody who stops now leaves, and how to go on."""
        return f"{counted(self.count, self.unit)} kept in {self.path}: repeat the command to go on"

    def _lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            yield from file

    def _read_setting(self) -> dict[str, Any]:
        if not self._file.seek(0, os.SEEK_END):
            return {}
        with suppress(ValueError, OSError):
            found = json.loads(self._beside.read_text("utf-8"))
            if isinstance(found, dict) and found:
                return found
        raise self._foreign(f"there is no {self._beside.name} beside it")

    def _foreign(self, why: str) -> ValueError:
        return ValueError(
            f"{self.path} cannot be gone on with, as {why}: give another {self.option}, or remove the file"
        )


def _lock(file: BinaryIO, path: Path) -> None:
    """Take a file for this process, until it is closed or the process ends, however that is."""
    try:
        import fcntl
    except ModuleNotFoundError:  # not Unix
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        said = "another process is at work on it: wait for its end, or give another place"
        raise BlockingIOError(errno.EWOULDBLOCK, said, str(path)) from None
    except OSError as error:
        said = f"it cannot be locked ({error.strerror}): give another place"
        raise type(error)(error.errno, said, str(path)) from None


def _cut_torn_line(file: BinaryIO) -> None:
    """Cut off what stands behind the last end of a line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(end - PIECE, 0)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            end = begin + found + 1
            break
        end = begin
    file.truncate(end)
