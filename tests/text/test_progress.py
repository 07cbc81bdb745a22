"""How far a long text has been read: lines, or a bar on a terminal."""

import io
import re
import sys

import pytest

from lit_gpt.text import files as files_module
from lit_gpt.text import progress as progress_module
from lit_gpt.text.files import Reader, TextFiles
from lit_gpt.text.progress import progress
from tests.text.conftest import write


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[-1])
    return now


def test_lines_become_rarer(clock, capsys):
    with progress("Encoding the text", 4_000_000_000) as advance:
        for second in range(1, 401):
            clock.append(float(second))
            advance(10_000_000)
    assert capsys.readouterr().err.splitlines() == [
        f"Encoding the text: {share}% of 4,000 MB, about {minutes} min left"
        for share, minutes in ((8, 6), (22, 5), (52, 3))  # after 30, 90 and 210 seconds
    ]


def test_lines_come_every_ten_minutes_in_the_end(clock, capsys):
    with progress("Encoding the text", 10**12) as advance:
        for second in range(0, 36_000, 10):
            clock.append(float(second))
            advance(10**6)
    assert len(capsys.readouterr().err.splitlines()) == 5 + (36_000 - 930) // 600


def test_a_short_text_shows_nothing(clock, capsys, monkeypatch):
    for stream in (sys.stderr, Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress("Reading the text", 100) as advance:
            clock.append(clock[-1] + 0.9)
            advance(100)
    assert (capsys.readouterr().err, stream.getvalue()) == ("", "")


def test_a_bar_on_a_terminal_goes_away(clock, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "120")
    with progress("Encoding the text", 200_000_000) as advance:
        for tenth in range(1, 21):
            clock.append(tenth / 10)
            advance(5_000_000)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "Encoding the text" in shown
    assert "25%" in shown  # after a second, and not before
    assert "5%" not in re.findall(r"\d+%", shown)
    assert "100.0/200.0 MB" in shown
    assert stream.getvalue().endswith("\x1b[2K")


def test_a_reader_says_how_many_bytes_it_has_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "CHUNK", 4)
    write(tmp_path / "a", b"0123456789")
    write(tmp_path / "b", b"01")
    told = []

    class Told:
        def __init__(self, task, size):
            told.append((task, size))
            self.advance = told.append

        def close(self):
            told.append("end")

    monkeypatch.setattr(progress_module, "_Lines", Told)
    reader = Reader(TextFiles(str(tmp_path)))
    assert told == [("Reading the text", 12), 4, 4, 2, 2, "end"]
    told.clear()
    reader.task = "Encoding the text"
    list(reader)
    assert told == [("Encoding the text", 12), 4, 4, 2, 2, "end"]
