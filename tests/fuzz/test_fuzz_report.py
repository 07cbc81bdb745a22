"""Odd run folders: reported as they are, or refused in one line. More with `pytest -m fuzz`."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.errors import UserError
from lit_gpt.reports.history import HISTORY, FinalResult, History, Session
from lit_gpt.reports.report import write_report
from tests.conftest import limited_memory
from tests.fuzz.examples import examples, nested, numbers
from tests.fuzz.test_fuzz_checkpoint import places_in, replaced
from tests.reports.test_run_files import event, write_events

MORE = 500_000_000  # bytes that a report on a run of a few kilobytes may take

plain = nested(
    st.sampled_from([10**18, -1, 10**4000, "9" * 5000, "\ud800", "</script>", 1e308]),
)
PARTS = ["a: ", "b: ", "- ", "&a ", "*a", "<<: ", "!!float ", "!!set ", "? ", "[", "]", "{", "}"]
PARTS += [", ", "\n", "  ", "1:", "59", ".inf", "~", "'", '"', "|\n", ">\n", "%TAG", "---\n", "x"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small run's folder, without its events."""
    folder = tmp_path / "version_0"
    folder.mkdir()
    history = History({"val/loss": [(0, 7.0), (50, 5.5)], "time": [(0, 1.7e9), (50, 1.7e9)]})
    history.add_samples(50, ["The "], ["The end"])
    history.sessions = [Session(0, 1.7e9, "python train.py", {"torch": "2.13"})]
    history.card = [("Total", "5 tokens")]
    history.final = FinalResult(5.5, 2.5, 100)
    history.save(folder)
    options = {"model": {"d_model": 16}, "trainer": {"max_steps": 50}}
    (folder / "config.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    return folder


def check(folder: Path) -> None:
    """A report is written, or a UserError names the folder in one line."""
    try:
        with limited_memory(MORE):
            write_report([str(folder)])
    except UserError as error:
        assert folder.name in str(error)  # noqa: PT017
        assert len(str(error).splitlines()) == 1  # noqa: PT017


@numbers(50, 1500)
def test_any_part_of_a_history_may_be_anything(folder, number):
    content = json.loads((folder / HISTORY).read_text(encoding="utf-8"))

    @examples(number)
    @given(st.sampled_from(places_in(content)), plain)
    def try_change(place: tuple, value: Any) -> None:
        changed = json.dumps(replaced(content, place, value))
        (folder / HISTORY).write_text(changed, encoding="utf-8")
        check(folder)

    try_change()


@numbers(50, 1500)
def test_a_config_may_be_anything(folder, number):
    @examples(number)
    @given(st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=40).map("".join))
    def try_text(text: str) -> None:
        (folder / "config.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        check(folder)

    try_text()


@numbers(50, 1500)
def test_events_may_be_anything(folder, number):
    (folder / HISTORY).unlink()
    path = folder / "events.out.tfevents.1.host"
    write_events(path, *(event(step, step / 7) for step in range(50)))
    content = path.read_bytes()
    for seed in range(number):
        rng, changed = random.Random(seed), bytearray(content)
        for _ in range(rng.randint(1, 3)):
            start, length = rng.randrange(len(changed)), rng.choice([1, 2, 8, 64, 512])
            part = bytes(changed[start : start + length])
            changed[start : start + length] = rng.choice([b"", part * 2, rng.randbytes(length)])
        path.write_bytes(changed)
        check(folder)


def test_a_file_may_be_a_folder_or_gone(folder):
    for name in (HISTORY, "config.yaml", "report.html"):
        copy = folder.parent / "copy"
        shutil.copytree(folder, copy)
        (copy / name).unlink(missing_ok=True)
        check(copy)
        (copy / name).unlink(missing_ok=True)
        (copy / name).mkdir()
        check(copy)
        shutil.rmtree(copy)
