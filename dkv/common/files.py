"""Where results go: a file is written whole, or not at all.

A regular file is made beside its place and moved there: whoever reads it, and whatever stops us, finds the old one or
the new one. A symbolic link is followed. What cannot be replaced (a FIFO, a terminal, an open file such as
/dev/stdout) takes the content once it is complete; `-` stands for standard output.
"""

import errno
import json
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

from dkv.common import process

# An option and its path, where it has one.
Named = tuple[str, str | os.PathLike | None]
STDOUT = 1
# Links that are followed before they count as a ring, as Linux does.
HOPS = 40
# What can neither be replaced nor written through, by its type in `st_mode`.
REFUSED = {
    stat.S_IFDIR: (errno.EISDIR, None),
    stat.S_IFSOCK: (errno.ENXIO, "Is a socket"),
    stat.S_IFBLK: (errno.ENXIO, "Is a block device"),
}


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write text in UTF-8; see `writing`."""
    with writing(path) as part:
        # A name that is not text in the system's encoding has half a surrogate pair for each odd byte.
        part.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_json(path: str | os.PathLike, content: Any, **form: Any) -> None:
    """Write `json.dumps(content, **form)`; see `writing`."""
    write_text(path, json.dumps(content, **form) + "\n")


def append_line(path: str | os.PathLike, line: str) -> None:
    """Add a line to a file, in one go: it is there as a whole, or not at all unless the disk is full.

    Raises:
        OSError: it cannot be written, or not as a whole.
    """
    left = f"{line}\n".encode("utf-8", "backslashreplace")
    with open(path, "ab", buffering=0) as file:
        try:
            # A disk that fills up takes a part, and says so when the rest comes.
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            raise type(error)(error.errno, error.strerror, str(path)) from error


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[Path]:
    """Give the path of an empty file to be written; what it holds at the end goes to `path`.

    The folder is made if it is missing. An existing file keeps its permissions, and its content if anything fails,
    an interrupt or a signal that ends the process included; the file beside it is then removed.

    Raises:
        OSError: it cannot be written; `filename` is the path.
    """
    place = part = None
    try:
        place = _place(Path(path))
        old = _checked(place)
        stream = isinstance(place, int) or (old is not None and not stat.S_ISREG(old.st_mode))
        folder = Path(tempfile.gettempdir()) if stream else place.parent
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".dkv-{secrets.token_hex(8)}.part"
        with process.undoing(partial(_remove, part)):
            try:
                os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if stream else 0o666))
                yield part
                _pour(part, place) if stream else _move(part, place, old)
            finally:
                _remove(part)
    except OSError as error:
        # As it was named, not as the file beside it; what fails for want of room has no name at all.
        named = error.filename is not None and str(error.filename) not in (str(place), str(part))
        if named or error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


def check_writable(option: str, path: str | os.PathLike, regular: bool = False) -> None:
    """Make the folder of a file that will be written, and see that it can be.

    Args:
        option: whose value the path is, for the message.
        regular: it will be read again, which only a regular file can.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        place = _place(Path(path))
        old = _checked(place)
        if isinstance(place, Path) and (old is None or stat.S_ISREG(old.st_mode)):
            place.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place.parent).close()
        elif regular:
            raise OSError(errno.EINVAL, "Not a regular file")
    except OSError as error:
        raise ValueError(f"{option}: cannot write {path} ({error.strerror}): give another place") from error


def check_outputs(outputs: Iterable[Named], inputs: Iterable[Named] = ()) -> None:
    """`check_writable` for options and their paths, where given; no two may be the same, nor one an input.

    Raises:
        ValueError: one cannot be written, or would overwrite another.
    """
    seen: dict[Any, str] = {_resolved(path): option for option, path in inputs if path is not None}
    for option, path in outputs:
        if path is None:
            continue
        check_writable(option, path)
        place = _resolved(path)
        if place in seen and place != Path(os.devnull):
            raise ValueError(f"{option}: {path} is that of {seen[place]}, too: give another place")
        seen[place] = option


def _resolved(path: str | os.PathLike) -> Path | int:
    place = _place(Path(path))
    return place if isinstance(place, int) else place.resolve()


def is_stream(path: str | os.PathLike) -> bool:
    """Whether a path takes what is written once, as a FIFO or a terminal does, and cannot be replaced later on."""
    place = _place(Path(path))
    return isinstance(place, int) or (place.exists() and not place.is_file())


def beside(*paths: str | os.PathLike | None) -> AbstractContextManager:
    """Inside, what is printed goes to standard error if one of the files is standard output, which is then its own."""
    if any(path is not None and _place(Path(path)) == STDOUT for path in paths):
        return redirect_stdout(sys.stderr)
    return nullcontext()


def _place(path: Path) -> Path | int:
    """The file that a path leads to, or the number of the open file that it stands for.

    Raises:
        OSError: links that lead to themselves.
    """
    if path == Path("-"):
        return STDOUT
    for _ in range(HOPS):
        if not path.is_symlink():
            return path
        folder = path.parent.resolve()
        if folder.parts[:2] == ("/", "proc") and folder.name == "fd":
            # The text of such a link is not a path, and where it is, opening that would cut the file off.
            return int(path.name) if folder.parts[2] == str(os.getpid()) else path
        path = folder / path.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _checked(place: Path | int) -> os.stat_result | None:
    """What is there, which can be written; None: nothing.

    Raises:
        OSError: it cannot be written.
    """
    if isinstance(place, int):
        import fcntl  # Unix alone, where paths can stand for open files

        if fcntl.fcntl(place, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Open for reading only")
        return os.fstat(place)
    try:
        old = place.stat()
    except FileNotFoundError:
        return None
    if (kind := stat.S_IFMT(old.st_mode)) in REFUSED:
        number, text = REFUSED[kind]
        raise OSError(number, text or os.strerror(number))
    if not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return old


def _move(part: Path, place: Path, old: os.stat_result | None) -> None:
    if old is not None:
        with suppress(OSError):  # a file of somebody else, or in a group that we are not in
            os.chown(part, old.st_uid, old.st_gid)
        os.chmod(part, stat.S_IMODE(old.st_mode))
    os.replace(part, place)


def _pour(part: Path, place: Path | int) -> None:
    if place == STDOUT:
        # What was printed before comes before.
        sys.__stdout__.flush()
    with open(part, "rb") as source, open(place, "wb", closefd=isinstance(place, Path)) as stream:
        shutil.copyfileobj(source, stream)


def _remove(part: Path) -> None:
    with suppress(OSError):
        part.unlink(missing_ok=True)
