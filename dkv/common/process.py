"""How a process of dkv begins and ends: interrupts, closed pipes, missing streams, exit codes.

Only what the interpreter has at hand is imported, so that an interrupt finds its handler in place almost at once.
Before that, while Python itself starts, nobody can handle one.

In a process that is ours (`begin`) an interrupt raises nothing: an exception could be swallowed by whatever code it
hits, a module that is being imported or a finalizer. The handler undoes what is half done (`undoing`), says what is
kept (`keeping`), and leaves. Where dkv is a guest, as in a notebook, `ended` turns a KeyboardInterrupt into the same.
"""

import atexit
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, SimpleNamespace

INTERRUPTED, UNREAD = 130, 141
# What bad input raises. Anything else is a fault of ours and keeps its traceback.
USER_ERRORS = (ValueError, IndexError, TypeError, OSError, MemoryError)
# Signals that end a process by default.
ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


# Seconds that others of several processes, which have not met, give the first one to say what ends them all.
LINGER = 3

# Of this process: its name in messages, whether `begin` made it ours, its exit code, open work, whether it is one of
# several and not the first, and who says what is said of an error that ends it.
_state = SimpleNamespace(name="dkv", ours=False, code=1, undo=[], notes=[], mute=False, judge=None)


def name() -> str:
    """What the process is called in messages."""
    return _state.name


def called(name: str) -> None:
    """Call the process so in messages."""
    _state.name = name


def say(line: str) -> None:
    """A line on standard error; where that is gone, there is nobody to tell."""
    with suppress(OSError, ValueError):
        if sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)


def judged_by(judge: Callable[[BaseException, str], str | None]) -> None:
    """Ask `judge` what is said of an error that ends this process, given it and its line; None: nothing."""
    _state.judge = judge


def several() -> bool:
    """Whether this process was started as one of several, which share a model (`dkv.parallel`)."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ


def begin(name: str) -> None:
    """Make this process ours, before anything slow is imported; to be called once, with its name in messages.

    Raises:
        SystemExit: standard output is closed, so that no result could be told.
    """
    called(name)
    _state.ours = True
    # Where the caller ignores interrupts, as a shell does for its background jobs, they stay ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    # The first registered is called last, when all others are done.
    atexit.register(_leave)
    told = sys.stdout is not None
    for number, stream in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, stream) is None:
            _fill(number, stream)
    if not told:
        say(f"{name}: error: standard output is closed: give it a file, a pipe or {os.devnull}")
        _state.code = 2
        sys.exit(2)
    # Of several processes, which torchrun numbers, the first one speaks.
    if several():
        # Where the process that keeps the others' words is gone, torch would print a trace of its own.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    _state.mute = several() and os.environ["RANK"] != "0"
    if _state.mute:
        # Stay open as long as the process. What ends it is said in spite of that, on the stream that it began with.
        sys.stdout, sys.stderr = (open(os.devnull, "w", encoding="utf-8") for _ in range(2))  # noqa: SIM115
    # A text is shown with escapes rather than lost where the terminal lacks a character.
    sys.stdout.reconfigure(errors="backslashreplace")


def _fill(number: int, stream: str) -> None:
    """Open the null device in place of a closed stream: the next file to be opened would take its number."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)
    # Stays open as long as the process.
    opened = open(number, "w" if number else "r", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    setattr(sys, stream, opened)


def run(call: Callable[[], int | None], errors: tuple[type[Exception], ...] = USER_ERRORS) -> None:
    """End this process with the exit code of `ended`."""
    _state.code = ended(call, errors)
    sys.exit(_state.code)


def _leave() -> None:
    """End at once when all that counts is done: while the interpreter takes itself apart, an interrupt kills it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(_state.code)


def ended(call: Callable[[], int | None], errors: tuple[type[Exception], ...] = USER_ERRORS) -> int:
    """The exit code of a command: that of `call()`, with everything written; or that of its end, with one line said.

    Args:
        call: returns an exit code, None for 0, or raises SystemExit.
        errors: what bad input raises.

    Returns:
        2 for bad input, or output that cannot be written; 130 when interrupted; 141 when nobody reads the output.
    """
    try:
        try:
            code = call()
        except SystemExit as stop:
            code = stop.code
            if code and _state.judge is None:
                _let_the_first_speak()
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        say(_interruption(stop.args))
        return INTERRUPTED
    except BrokenPipeError as error:
        _abandon_output()
        _judge(error, "nobody reads the output")
        return UNREAD
    except Exception as error:
        # torch's OutOfMemoryError, told by name as torch is not imported here.
        if not isinstance(error, errors) and type(error).__name__ != "OutOfMemoryError":
            sys.stderr = sys.__stderr__ if _state.mute else sys.stderr
            _judge(error, f"{_state.name}: {type(error).__name__}: {in_one_line(error)}")
            raise
        tell(error, "standard output: " if _abandon_output() or _unnamed(error) else "")
        return 2
    if isinstance(code, str):
        say(code)
        return 1
    return code or 0


def tell(error: Exception, where: str = "") -> None:
    """Say what ends this process, also where it goes on for a while."""
    if said := _judge(error, f"{_state.name}: error: {where}{in_one_line(error)}"):
        sys.stderr = sys.__stderr__ if _state.mute else sys.stderr
        say(said)


def _judge(error: BaseException, line: str) -> str | None:
    """What is said of an error that ends this process; None: nothing."""
    if _state.judge is not None:
        return _state.judge(error, line)
    _let_the_first_speak()
    return line


def _let_the_first_speak() -> None:
    """Of several processes that fail alike, the launcher ends all others as soon as one is gone."""
    if _state.mute:
        time.sleep(LINGER)


def in_one_line(error: BaseException) -> str:
    """What an error says."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _abandon_output() -> bool:
    """Whether standard output takes nothing more; the interpreter flushes at its end: let that go nowhere."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _unnamed(error: Exception) -> bool:
    """Whether a write to a stream failed: files are named in their errors, and an unbuffered stream keeps nothing."""
    full = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)
    return isinstance(error, OSError) and error.errno in full and error.filename is None


@contextmanager
def undoing(undo: Callable[[], object]) -> Iterator[None]:
    """Inside, a signal that ends the process calls `undo` first; any other end is left to the caller."""
    with _ends_handled():
        _state.undo.append(undo)
        try:
            yield
        finally:
            _state.undo.remove(undo)


@contextmanager
def keeping(note: Callable[[], str]) -> Iterator[None]:
    """Inside, a signal that ends the process says `note()`: what is kept of the work, and how to go on.

    Nothing is said where it is empty.
    """
    with _ends_handled():
        _state.notes.append(note)
        try:
            yield
        except KeyboardInterrupt as stop:
            stop.args = (*stop.args, note())
            raise
        finally:
            _state.notes.remove(note)


@contextmanager
def _ends_handled() -> Iterator[None]:
    """Inside, signals that end the process by default are ours."""
    before = {}
    if _state.ours and not (_state.undo or _state.notes):
        # A handler runs when Python does, hence later than the default: there is one only where it is needed.
        with suppress(ValueError):  # not the main thread
            before = {s: signal.signal(s, _end) for s in ENDS if signal.getsignal(s) is signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interruption(notes: tuple[str, ...]) -> str:
    return "; ".join([f"{_state.name}: interrupted", *filter(None, notes)])


def _undo() -> None:
    for undo in reversed(_state.undo):
        with suppress(Exception):
            undo()


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A second one must not stop what the first began to undo, but it ends a wait for whoever reads the output.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _undo()
    notes = _notes()
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    with suppress(Exception):
        if _state.judge is not None:
            _state.judge(KeyboardInterrupt(), "interrupted")
    if not _state.mute:
        _say_at_once(_interruption(notes))
    with suppress(Exception):
        sys.stdout.flush()
    os._exit(INTERRUPTED)


def _end(number: int, frame: FrameType | None) -> None:
    """Undo, say what is kept, and die of the signal as by default."""
    _undo()
    if notes := list(filter(None, _notes())):
        _say_at_once("; ".join([f"{_state.name}: ended by {signal.Signals(number).name}", *notes]))
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _notes() -> tuple[str, ...]:
    """What is kept of the work."""
    notes = []
    for note in reversed(_state.notes):
        with suppress(Exception):
            notes.append(note())
    return tuple(notes)


def _say_at_once(line: str) -> None:
    """A line below what a progress bar or the terminal's ^C left; unbuffered, as a stream may be in use."""
    with suppress(Exception):
        fresh = "\n" if os.isatty(2) else ""
        os.write(2, f"{fresh}{line}\n".encode(errors="backslashreplace"))
