"""Crash-safe files: a kill or a full disk in mid-write leaves the previous content."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from resource import RLIMIT_FSIZE, getrlimit, setrlimit

import pytest

from ldmole_dist.errors import UserError
from ldmole_dist.io import (
    Digest,
    append_jsonl,
    append_lines,
    atomic_file,
    atomic_folder,
    atomic_write,
    file_digest,
    publish_folder,
    read_jsonl,
    read_lines,
    start_folder,
    write_errors,
)


def run_until_killed(write: Callable[[], None]) -> None:
    """Run `write`, which must call `kill`, in a child process."""
    child = os.fork()
    if child == 0:
        try:
            write()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill() -> None:
    """End this process as `kill -9` does: no clean-up code runs."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Make writes beyond `size` bytes of a file fail, like a full disk."""
    limits = getrlimit(RLIMIT_FSIZE)
    setrlimit(RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        setrlimit(RLIMIT_FSIZE, limits)


def test_kill_in_mid_write_keeps_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, "previous")

    def write() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            file.flush()
            kill()

    run_until_killed(write)
    assert path.read_text() == "previous"
    assert atomic_write(path, "new é") == file_digest(path) == Digest(6, file_digest(path).sha256)
    assert path.read_text(encoding="utf-8") == "new é"


def test_error_in_mid_write_keeps_previous_file_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, "previous")
    with pytest.raises(ValueError), atomic_file(path) as file:
        file.write(b"half")
        raise ValueError
    message = r"cannot write the table: File too large\. Existing content is unchanged; free disk space"
    with pytest.raises(UserError, match=message), largest_file(10), write_errors("the table"):
        atomic_write(path, "x" * 20)
    assert path.read_text() == "previous" and list(tmp_path.iterdir()) == [path]


def test_written_files_are_readable_like_ordinary_ones(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    atomic_write(tmp_path / "atomic", "")
    modes = [(tmp_path / name).stat().st_mode for name in ("ordinary", "atomic")]
    assert modes[0] == modes[1]


def test_symbolic_links_and_devices_are_kept(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    atomic_write(link, "text")
    assert link.is_symlink() and target.read_text() == "text"
    atomic_write(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()


def test_kill_in_mid_write_leaves_no_folder_and_the_next_attempt_succeeds(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "new") as unfinished:
            (unfinished / "half").write_text("x")
            kill()

    run_until_killed(write)
    assert not (tmp_path / "new").exists()
    with atomic_folder(tmp_path / "new") as unfinished:
        (unfinished / "file").write_text("text")
        assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "file"]


def test_failed_folder_is_removed_and_existing_one_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(ValueError), atomic_folder(folder) as unfinished:
        (unfinished / "half").write_text("x")
        raise ValueError
    assert not list(tmp_path.iterdir())
    folder.mkdir()
    (folder / "previous").write_text("")
    with pytest.raises(OSError), atomic_folder(folder) as unfinished:
        (unfinished / "new").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "previous"]
    (start_folder(folder) / "new").write_text("")
    publish_folder(folder, replace=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "new"]


def test_incomplete_last_line_is_skipped_and_then_replaced(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    assert list(read_lines(path)) == []
    append_lines(path, ["one", "two"])
    with path.open("a") as file:
        file.write("x" * 100_000)  # longer than the block in which the end of the file is searched
    assert list(read_lines(path)) == [b"one\n", b"two\n"]
    append_lines(path, ["three"])
    assert path.read_text() == "one\ntwo\nthree\n"
    path.write_text("half")
    append_lines(path, ["one"])
    assert path.read_text() == "one\n"


def test_failed_append_leaves_no_part_of_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_lines(path, ["one"])
    with largest_file(10), pytest.raises(OSError, match="File too large"):
        append_lines(path, ["two", "three"])
    assert path.read_text() == "one\n"


def test_json_lines_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "values.jsonl"
    values = [{"text": "line\u2028separator\né"}, [1, None], "x"]
    append_jsonl(path, values[:2])
    with path.open("a") as file:
        file.write('{"ha')
    append_jsonl(path, values[2:])
    assert read_jsonl(path) == values and len(path.read_bytes().splitlines()) == 3


def test_json_error_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "values.jsonl"
    path.write_text('{}\n{"a"\n')
    with pytest.raises(UserError, match=r"values\.jsonl, line 2 is not valid JSON \(.*\); delete that line\."):
        read_jsonl(path)
