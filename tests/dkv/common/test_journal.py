"""A file of finished work: nothing lost, nothing twice, nothing of another setting, and nobody else in it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dkv.common import files
from dkv.common.journal import PIECE, Journal

ROOT = Path(__file__).parents[3]


def opened(folder, setting=None, found=None):
    journal = Journal(folder / "results.jsonl", "answer", "--out")
    journal.begin({"seed": 1} if setting is None else setting)
    journal.read((lambda record: record["id"]) if found is None else lambda record: found.append(record["id"]))
    return journal


@pytest.mark.parametrize("size", [1, 100, 3 * PIECE])
def test_a_torn_line_is_cut_off_wherever_it_was_torn(tmp_path, size):
    path = tmp_path / "results.jsonl"
    with opened(tmp_path) as journal:
        assert journal.setting == {"seed": 1} and path.read_bytes() == b""
        journal.add({"id": 1})
        journal.add({"id": 2, "text": "x" * size})
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in {first - 3, first, first + 1, len(whole) // 2, len(whole) - 1, len(whole)}:
        path.write_bytes(whole[:end])
        found = []
        with opened(tmp_path, found=found) as journal:
            assert found == [1, 2][: whole[:end].count(b"\n")] and journal.count == len(found)
            if len(found) < 2:
                journal.add({"id": 3})
        lines = path.read_bytes().split(b"\n")
        assert lines.pop() == b"" and [json.loads(line)["id"] for line in lines] == [*found, 3][:2]


def test_records_of_another_setting_are_not_added_to(tmp_path):
    with opened(tmp_path, {"seed": 1, "steps": (4, 8), "policy": {"name": "dual"}}):
        pass
    # Without a record nothing depends on it.
    with opened(tmp_path, {"seed": 2, "steps": (4, 8)}) as journal:
        journal.add({"id": "a"})
    with opened(tmp_path, {"seed": 2, "steps": (4, 8)}) as journal:
        assert journal.kept() == f"1 answer kept in {journal.path}: repeat the command to go on"
    before = journal.path.read_bytes()
    with pytest.raises(ValueError, match=r"was made with steps \[4, 8\], not \[4\]: give another --out, or remove the"):
        opened(tmp_path, {"seed": 2, "steps": [4]})
    assert journal.path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1}\nnot json\n{"id": 2}\n', "its line 2 is none of its records"),
        ('{"id": 1}\n[]\n', "its line 2 is none of its records"),
        ('{"id": 1}\n{}\n', "its line 2 is none of its records"),
    ],
)
def test_what_is_damaged_is_refused_and_left_as_it_is(tmp_path, text, message):
    with opened(tmp_path) as journal:
        journal.path.write_text(text)
    with pytest.raises(ValueError, match=f"{message}: give another --out, or remove the file"):
        opened(tmp_path)
    assert journal.path.read_text() == text
    journal.path.with_suffix(".setting.json").unlink()
    with pytest.raises(ValueError, match=r"there is no results.setting.json beside it"):
        opened(tmp_path)


HOLDS = """
import sys
from pathlib import Path
from dkv.common.journal import Journal
with Journal(Path(sys.argv[1]), "answer", "--out"):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_two_processes_are_never_in_one_file(tmp_path):
    path = tmp_path / "results.jsonl"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], **pipes) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(BlockingIOError, match="another process is at work on it"):
            opened(tmp_path)
        # However it ends.
        other.kill()
    opened(tmp_path).close()


def test_a_line_that_the_disk_takes_a_part_of_is_an_error(tmp_path, monkeypatch):
    class Disk:
        def __init__(self, path, *_, **__):
            self.room, self.file = 5, open(path, "ab")  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            taken, self.room = self.file.write(data[: self.room]), 0
            return taken

    monkeypatch.setattr(files, "open", Disk, raising=False)
    with pytest.raises(OSError, match=r"No space left on device: '.*a.jsonl'"):
        files.append_line(tmp_path / "a.jsonl", "123456789")
    assert (tmp_path / "a.jsonl").read_bytes() == b"12345"
