"""generate.py --interactive, as a process: at a terminal and from a pipe."""

from __future__ import annotations

import contextlib
import io
import os
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest

from lit_gpt.__main__ import main
from lit_gpt.generation.interactive import OPTIONS
from lit_gpt.text.vocabularies import load_tokenizer
from tests.conftest import ROOT
from tests.generation.models import save_model, small_model

pty = pytest.importorskip("pty")  # where terminals are


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("interactive") / "small.ckpt"
    return save_model(small_model(context_length=64), load_tokenizer("bytes"), path)


@pytest.fixture
def write(path, capsys, monkeypatch):
    """`write("--seed=2")`: what the command prints when it reads `stdin`."""

    def call(*argv: str, stdin: str = "") -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        assert main(["generate", f"--ckpt_path={path}", *argv]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def talk(write):
    """`talk("the cat", "/more")`: its answer to each line, after the greeting."""

    def call(*lines: str) -> list[str]:
        words = ["--interactive", "--max_new_tokens=9"]
        greeting, *said = write(*words, stdin="\n".join(lines)).split("> ")
        assert greeting == "Type some text to continue; /help lists the commands.\n"
        return said

    return call


def test_answers_are_those_of_the_command_and_seeds_go_up(talk, write):
    said = talk("the cat", "the cat", "/seed 1337", "the cat")
    assert said[0] == write("--prompt=the cat", "--max_new_tokens=9")
    assert said[1] == write("--prompt=the cat", "--max_new_tokens=9", "--seed=1338")
    assert said[1] != said[0] == said[3]


def test_each_command_changes_the_next_answer(talk, write):
    options = {"temperature": "0.0", "top_k": "1", "top_p": "0.2", "min_p": "0.9"}
    options |= {"repetition_penalty": "50.0", "max_new_tokens": "4", "stop": "a"}
    lines = [line for name in options for line in (f"/{name} {options[name]}", "/options")]
    said = talk(*lines, "/stop", "/top_k none", "/options")
    for number, (name, value) in enumerate(options.items()):
        assert f"/{name} {value}\n" in said[2 * number + 1]
    assert "/stop\n" in said[-2]
    assert "/top_k none\n" in said[-2]
    plain = ["--max_new_tokens=9", "--prompt=the cat"]
    for name in ("temperature", "top_k", "max_new_tokens"):
        said = talk(f"/{name} {options[name]}", "the cat")
        assert said[1] == write(*plain, f"--{name}={options[name]}")
        assert said[1] != write(*plain)


def test_more_history_and_a_prompt_with_a_slash(talk, write):
    said = talk("//cat", "/more", "/history")
    first, second = (text.rstrip("\n") for text in said[:2])
    assert first.startswith("/cat")
    assert second.startswith(first)
    assert len(second) > len(first)
    history = "> ".join(said[2:])
    assert "/cat\n" + first.removeprefix("/cat") in history
    assert history.rstrip("\n> ").endswith(second.removeprefix(first))


def test_a_trace_can_be_turned_on_and_off(talk, write):
    said = talk("/trace on", "the cat", "/trace off", "the cat")
    assert "likeliest" in said[1]
    assert "likeliest" not in said[3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temperature hot", "/temperature 'hot': must be a number"),
        ("/temperature", "/temperature '': must be a number"),
        ("/temperature -1", "/temperature -1.0: must be in [0, 1e6]"),
        ("/top_k 0", "/top_k 0: must be at least 1"),
        ("/max_new_tokens 0", "/max_new_tokens 0: must be at least 1"),
        ("/seed -1", "/seed -1: must be in [0, 2**63)"),
        ("/trace maybe", "/trace 'maybe': must be on or off"),
        ("/more", "/more: there is no answer to continue yet"),
        (
            "/temprature 1",
            "unknown command /temprature; /help lists the commands, //temprature is a prompt",
        ),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(talk, line, message):
    before, said, after, _ = talk("/options", line, "/options")
    assert said == f"error: {message}\n"
    assert before == after


def test_help_names_every_command(talk, write):
    (said, _) = talk("/help")
    for name in (*OPTIONS, "more", "options", "history", "quit"):
        assert f"/{name}" in said


class Terminal:
    """The command at a terminal of its own."""

    def __init__(self, words: list[str]) -> None:
        words = [sys.executable, str(ROOT / "scripts" / "generate.py"), *words]
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.execve(words[0], words, {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"})
        self.seen = ""

    def until(self, pattern: str) -> str:
        """Reads until the pattern appears, and returns all output up to its end."""
        end = time.monotonic() + 60
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            ready, _, _ = select.select([self.file], [], [], max(0, end - time.monotonic()))
            assert ready, f"{pattern!r} never came: {self.seen!r}"
            self.seen += os.read(self.file, 4096).decode("utf-8", "replace")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def interrupt(self) -> None:
        """Presses Ctrl-C and waits for the next prompt; the terminal may lose output meanwhile."""
        self.type("\x03")
        time.sleep(0.5)
        self.type("/seed 8888\n/options\n")
        self.before = self.until("/seed 8888\r?\n/stop.*> ")

    def type(self, keys: str) -> None:
        os.write(self.file, keys.encode())


def test_at_a_terminal_ctrl_c_ends_the_answer_and_arrow_up_brings_back_the_prompt(path):
    terminal = Terminal([f"--ckpt_path={path}", "--interactive", "--max_new_tokens=1000000"])
    try:
        terminal.until("> ")
        terminal.type("the cat\n")
        terminal.until(r"the cat\r\n")
        terminal.until("the cat.{30}")  # streamed, while it is far from done
        terminal.interrupt()
        terminal.type("half a line")
        terminal.interrupt()  # it is dropped
        terminal.type("/trace on\nand\n")
        terminal.until("and.{30}")
        terminal.interrupt()
        assert "likeliest" in terminal.before  # of what there was
        terminal.type("/trace off\n/max_new_tokens 3\n")
        terminal.until("> .*> ")
        terminal.type("the cat\n")
        terminal.until(r"the cat.*\n> ")
        terminal.type("\x1b[A\n")  # up
        assert "the cat" in terminal.until(r"\r\n")
        terminal.until("the cat")
        terminal.until("> ")
        terminal.type("\x04")
        _, status = os.waitpid(terminal.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(terminal.pid, signal.SIGKILL)
