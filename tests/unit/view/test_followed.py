"""Files that grow, are replaced, shortened or removed while they are followed."""

from pathlib import Path

import pytest

from megatron_p2o.view.followed import FollowedFile


class Taken:
    def __init__(self, path: Path) -> None:
        self.lines: list[bytes] = []
        self.file = FollowedFile(path, self.lines.clear, self.lines.append)

    def after_a_look(self) -> list[bytes]:
        self.file.catch_up()
        return list(self.lines)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_each_line_is_taken_once_and_a_torn_one_waits(path: Path) -> None:
    taken = Taken(path)
    assert taken.after_a_look() == []
    path.write_bytes(b"one\ntw")
    assert taken.after_a_look() == [b"one"]
    with path.open("ab") as file:
        file.write(b"o\nthree\n")
    assert taken.after_a_look() == [b"one", b"two", b"three"]
    assert taken.after_a_look() == [b"one", b"two", b"three"]


def test_a_file_that_was_replaced_is_read_from_its_start(path: Path) -> None:
    taken = Taken(path)
    path.write_bytes(b"one\ntwo\n")
    taken.after_a_look()
    other = path.with_name("new")
    other.write_bytes(b"one\nother\nlines\n")
    other.replace(path)
    assert taken.after_a_look() == [b"one", b"other", b"lines"]


def test_a_file_that_was_shortened_is_read_from_its_start(path: Path) -> None:
    taken = Taken(path)
    path.write_bytes(b"one\ntwo\n")
    taken.after_a_look()
    path.write_bytes(b"1\n")
    assert taken.after_a_look() == [b"1"]


def test_a_file_that_is_gone_is_forgotten_and_may_come_back(path: Path) -> None:
    taken = Taken(path)
    path.write_bytes(b"one\n")
    taken.after_a_look()
    path.unlink()
    assert taken.after_a_look() == []
    path.write_bytes(b"two\n")
    assert taken.after_a_look() == [b"two"]


def test_damaged_lines_are_counted_in_the_file_as_it_is_now(path: Path) -> None:
    numbers: list[int] = []
    file = FollowedFile(path, numbers.clear, lambda line: numbers.append(int(line)))
    path.write_bytes(b"1\ntwo\nthree\n4\n")
    file.catch_up()
    assert (numbers, file.num_damaged) == ([1, 4], 2)
    restored = path.with_name("restored")
    restored.write_bytes(b"1\n2\n")
    restored.replace(path)
    file.catch_up()
    assert (numbers, file.num_damaged) == ([1, 2], 0)
    path.unlink()
    file.catch_up()
    assert (numbers, file.num_damaged) == ([], 0)
