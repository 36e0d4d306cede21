"""Files are written whole or not at all, whatever stands in their place."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dkv.common import files

ROOT = Path(__file__).parents[3]
as_a_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_has_the_permissions_of_any_other(tmp_path, umask):
    files.write_text(tmp_path / "new" / "deep" / "a", "text\n")
    assert (tmp_path / "new" / "deep" / "a").read_text() == "text\n"
    assert stat.S_IMODE((tmp_path / "new" / "deep" / "a").stat().st_mode) == 0o640
    assert names(tmp_path / "new" / "deep") == ["a"]


@pytest.mark.parametrize("mode", [0o600, 0o666, 0o755])
def test_an_existing_file_keeps_its_permissions(tmp_path, umask, mode):
    path = tmp_path / "a"
    path.write_text("old, and longer than the new one")
    path.chmod(mode)
    files.write_text(path, "new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == mode


def test_a_reader_keeps_the_old_file(tmp_path):
    """It is replaced, not emptied and filled again."""
    path = tmp_path / "a"
    path.write_text("old")
    with path.open() as reader:
        files.write_text(path, "new")
        assert reader.read() == "old"


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), OSError("no number")], ids=repr)
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(type(error)) as raised, files.writing(path) as part:
        part.write_text("half")
        raise error
    assert raised.value is error
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("link", ["target", "../here/target", "{}/target", "second"])
def test_a_link_is_followed_and_stays(tmp_path, link):
    (tmp_path / "here").mkdir()
    path, target = tmp_path / "here" / "link", tmp_path / "here" / "target"
    (tmp_path / "here" / "second").symlink_to("target")
    path.symlink_to(link.format(tmp_path / "here"))
    for text in ("dangling before", "again"):
        files.check_writable("--json", path)
        files.write_text(path, text)
        assert target.read_text() == text and path.is_symlink() and not target.is_symlink()
    assert names(tmp_path / "here") == ["link", "second", "target"]


def test_links_in_a_ring_are_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ValueError, match=r"--json: cannot write .*a .Too many levels of symbolic links.: give another"):
        files.check_writable("--json", tmp_path / "a")
    with pytest.raises(OSError, match="Too many levels"):
        files.write_text(tmp_path / "a", "text")
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("linked", [False, True])
def test_a_fifo_takes_the_whole_content_once(tmp_path, linked):
    fifo, path = tmp_path / "fifo", tmp_path / ("link" if linked else "fifo")
    os.mkfifo(fifo)
    if linked:
        path.symlink_to(fifo)
    read = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    reader.start()
    files.check_writable("--json", path)  # opens nothing: the reader would see an end
    with files.writing(path) as part:
        assert part.parent != tmp_path
        part.write_bytes(b"x" * 100_000)
    reader.join(10)
    assert read == [b"x" * 100_000] and stat.S_ISFIFO(fifo.stat().st_mode)
    assert files.is_stream(path) and not part.exists()


def test_a_fifo_gets_nothing_of_what_failed(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="bad"), files.writing(tmp_path / "fifo"):
        raise ValueError("bad")
    # With no reader, opening it would have waited for ever.
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_devices_are_written_through(tmp_path):
    (tmp_path / "null").symlink_to("/dev/null")
    for path in (Path("/dev/null"), tmp_path / "null"):
        before = os.stat("/dev/null")
        files.check_writable("--json", path)
        files.write_text(path, "text")
        assert os.stat("/dev/null").st_ino == before.st_ino and stat.S_ISCHR(os.stat(path).st_mode)
        assert files.is_stream(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as error:
        files.write_text(tmp_path / "full", "text")
    assert error.value.filename == str(tmp_path / "full")


def test_what_cannot_be_written_is_refused_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    (tmp_path / "file").touch()
    cases = {
        "socket": "Is a socket",
        ".": "Is a directory",
        "file/a": "Not a directory",
        "n" * 300: "File name too long",
    }
    before = names(tmp_path)
    for name, reason in cases.items():
        with pytest.raises(ValueError, match=r"--csv: cannot write ") as error:
            files.check_writable("--csv", name)
        assert str(error.value) == f"--csv: cannot write {name} ({reason}): give another place"
        with pytest.raises(OSError, match=reason) as failed:
            files.write_text(name, "text")
        assert failed.value.filename == name
    assert names(tmp_path) == before


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    path = tmp_path / ("n" * 255)
    files.check_writable("--json", path)
    files.write_text(path, "text")
    assert path.read_text() == "text" and len(names(tmp_path)) == 1


@as_a_user
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_for_reading_only_is_refused(tmp_path, what):
    path = tmp_path / "folder" / "a"
    path.parent.mkdir()
    path.write_text("old")
    (path if what == "file" else path.parent).chmod(0o555)
    try:
        with pytest.raises(ValueError, match="Permission denied"):
            files.check_writable("--json", path)
        with pytest.raises(PermissionError):
            files.write_text(path, "new")
        assert path.read_text() == "old" and names(path.parent) == ["a"]
    finally:
        path.parent.chmod(0o755)


def test_check_writable_makes_the_folder_and_no_file(tmp_path):
    path = tmp_path / "new" / "deep" / "a.json"
    files.check_writable("--json", path)
    assert path.parent.is_dir() and not names(path.parent)


def test_what_is_read_again_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match=r"--out: cannot write .*fifo .Not a regular file.: give another place"):
        files.check_writable("--out", tmp_path / "fifo", regular=True)
    files.check_writable("--out", tmp_path / "new", regular=True)


def test_no_file_is_written_twice_and_no_input_is_overwritten(tmp_path):
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "data").write_text("mine")
    a, link, data = tmp_path / "a", tmp_path / "link", tmp_path / "data"
    with pytest.raises(ValueError, match=r"--csv: .*link is that of --json, too: give another place"):
        files.check_outputs([("--json", a), ("--csv", link)])
    with pytest.raises(ValueError, match=r"--csv: - is that of --json, too"):
        files.check_outputs([("--json", "-"), ("--csv", Path("-"))])
    with pytest.raises(ValueError, match=r"--json: .*data is that of --data, too"):
        files.check_outputs([("--json", data)], [("--data", data)])
    files.check_outputs([("--json", "/dev/null"), ("--csv", "/dev/null"), ("--out", None)], [("--data", None)])


def test_half_a_surrogate_pair_is_escaped(tmp_path):
    files.write_text(tmp_path / "a", "name \udcff é\n")
    assert (tmp_path / "a").read_text("utf-8") == "name \\udcff é\n"


WRITE = """
import sys
from dkv.common import files
with files.beside(*sys.argv[1:]):
    print("before")
    for path in sys.argv[1:]:
        files.check_writable("--json", path)
        files.write_json(path, {"a": 1})
    print("after")
"""


@pytest.mark.parametrize("path", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_standard_output_is_for_the_file_alone(tmp_path, path, kind):
    (tmp_path / "link").symlink_to("/dev/stdout")
    with (tmp_path / "out").open("w") as out:
        where = {"stdout": out if kind == "file" else subprocess.PIPE, "stderr": subprocess.PIPE}
        done = subprocess.run(
            [sys.executable, "-c", WRITE, path],
            cwd=tmp_path,
            text=True,
            check=True,
            **where,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    text = done.stdout if kind == "pipe" else (tmp_path / "out").read_text()
    assert json.loads(text) == {"a": 1} and text.count("\n") == 1
    assert done.stderr == "before\nafter\n" and names(tmp_path) == ["link", "out"]


def test_an_open_file_is_added_to(tmp_path):
    """As a shell opens it: `3>> log`, where /dev/fd/3 must neither be replaced nor cut off."""
    path = tmp_path / "log"
    path.write_text("old\n")
    with path.open("a") as log:
        inode = path.stat().st_ino
        files.write_text(f"/dev/fd/{log.fileno()}", "new\n")
    assert path.read_text() == "old\nnew\n" and path.stat().st_ino == inode
    with path.open() as log, pytest.raises(ValueError, match="Open for reading only"):
        files.check_writable("--json", f"/dev/fd/{log.fileno()}")


@pytest.mark.parametrize("ends", ["TERM", "HUP", "INT"])
def test_a_signal_leaves_the_old_file_and_nothing_beside_it(tmp_path, ends):
    code = f"""
import os, signal
from dkv.common import files, process
signal.signal(signal.SIGINT, signal.default_int_handler)
process.begin("dkv test")
def call():
    with files.writing("a") as part:
        part.write_text("half")
        os.kill(os.getpid(), signal.SIG{ends})
process.run(call)
"""
    (tmp_path / "a").write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    said = (130, "dkv test: interrupted\n") if ends == "INT" else (-{"TERM": 15, "HUP": 1}[ends], "")
    assert (done.returncode, done.stderr) == said
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_a_line_that_cannot_be_added_names_its_file():
    with pytest.raises(OSError, match="/dev/full"):
        files.append_line("/dev/full", "line")
