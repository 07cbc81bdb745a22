"""The report of a run: its numbers, its safety, its continuity, and the command that writes it."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

from lit_gpt.__main__ import main
from lit_gpt.reports.history import FinalResult, History, Session, read_history
from lit_gpt.reports.report import Run, comparison_page, run_page
from tests.conftest import ROOT, SMALL, Result, command_line, write_text

HOSTILE = "</script><b>&amp; \"quoted' <script>document.title = 'taken'</script>\u202e猫\x00"
HEAD = ["Step", "Training loss", "Validation loss", "Perplexity", "Bits per byte"]


class Elements(HTMLParser):
    """What a page is made of: tags with their attributes, rows of tables, text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.is_in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.is_in_cell = True

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.is_in_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.is_in_cell = self.is_in_cell and tag not in ("th", "td")

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.tags if attributes.get(name)]


def losses_of(page: str) -> list[str]:
    """The lines that the run printed, from the page's table of evaluations."""
    rows = Elements(page).rows
    start = rows.index(HEAD) + 1
    return [
        f"Step: {step}, Training Loss: {train}, Validation Loss: {val}"
        for step, train, val, *_ in (row for row in rows[start:] if len(row) == 5)
    ]


def folder_of(result: Result) -> Path:
    return Path(result.run.trainer.log_dir)


def page_of(folder: Path) -> str:
    return (folder / "report.html").read_bytes().decode()  # line ends as they are


def made_up(**changes: Any) -> Run:
    """A run whose curves are easily told apart; the validation loss is best at step 150."""
    val = [(0, 7.0), (50, 5.5), (100, 4.4), (150, 3.8), (200, 4.2)]
    train = [(0, 6.0), (50, 4.5), (100, 3.0), (150, 2.4), (200, 2.2)]
    history = History({"val/loss": val, "train/eval_loss": train})
    history.add_samples(200, ["The "], ["The end"])
    history.sessions = [Session(0, 1.7e9, "python train.py", {"torch": "2.13"})]
    for name, value in changes.items():
        setattr(history, name, value)
    return Run("version_0", history, {"model.d_model": "80"})


@dataclass
class Finished:
    """A run that came to its end, and what it printed."""

    folder: Path
    options: dict[str, Any]
    out: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("run")
    options = SMALL | {
        "data.path": write_text(folder / "text.txt"),
        "data.cache": folder / "cache",
        "trainer.default_root_dir": folder / "logs",
        "model.dropout": 0.25,
    }
    argv = [sys.executable, str(ROOT / "scripts" / "train.py"), *command_line(options)]
    done = subprocess.run(argv, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    return Finished(folder / "logs" / "version_0", options, done.stdout)


@pytest.fixture
def logs(finished: Finished, tmp_path: Path) -> Path:
    """A folder of logs with a copy of the finished run, as version_0."""
    shutil.copytree(finished.folder, tmp_path / "logs" / "version_0")
    return tmp_path / "logs"


@pytest.fixture
def make(capfd: pytest.CaptureFixture):
    """`make("0", logs=...)`: the report command in this process; its status, output, errors."""

    def call(*runs: object, **options: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main(["report", *map(str, runs), *command_line(options)])
        return status, *capfd.readouterr()

    return call


def test_the_page_has_the_numbers_that_the_run_printed(finished):
    page = page_of(finished.folder)
    printed = [line for line in finished.out.splitlines() if line.startswith("Step: ")]
    assert len(printed) == 4
    assert losses_of(page) == printed
    elements = Elements(page)
    text = " ".join(elements.text.split())
    losses = [(float(line.rpartition(" ")[2]), i) for i, line in enumerate(printed) if i]
    best, i = min(losses)
    assert f"Best validation loss{best:.3f}at step {2 * i}" in text
    assert f", best: {best:.3f} at step {2 * i};" in elements.attributes("aria-label")[0]
    final = re.search(r"loss: ([\d.]+) .*perplexity ([\d.]+), ([\d.]+) bits", finished.out)
    assert f"Final validation loss{final[1]}whole split, perplexity {final[2]}" in text
    assert f"Bits per byte{final[3]}whole split" in text
    rows = [": ".join(row) for row in elements.rows]
    card = finished.out.splitlines()[:8]
    assert rows[rows.index(card[0]) :][:8] == card
    history = read_history(finished.folder)
    assert f"{history.final.loss:.4f}" == final[1]
    assert history.final.num_tokens > 100


def test_it_has_samples_options_versions_and_the_command(finished):
    page = page_of(finished.folder)
    text = Elements(page).text
    history = read_history(finished.folder)
    step, samples = history.samples[-1]
    assert (step, len(samples)) == (6, 3)
    for sample, prompt in zip(samples, history.prompts, strict=True):
        assert sample.startswith(prompt)
        assert f"<mark>{escape(prompt)}</mark>{escape(sample[len(prompt) :])}</div>" in page
    assert "model.dropout 0.25" in text
    assert f"data.path {finished.options['data.path']}" in text
    assert "train.py --model.d_model=16 --model.num_blocks=2" in text
    assert f"torch{version('torch')}" in text
    assert history.sessions[0].step == 0


def test_the_page_loads_nothing(finished):
    page = page_of(finished.folder)
    banner = "/*! https://github.com/leeoniya/uPlot"  # the only address, in a comment
    assert re.findall(r"https?:|url\(|@import", page.replace(banner, "")) == []
    for tag, attributes in Elements(page).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action", "style"} & set(attributes)
    assert "default-src 'none'; style-src 'sha256-" in page


def test_the_command_writes_the_page_that_the_run_wrote(finished, logs, make, tmp_path):
    own = page_of(finished.folder)
    (logs / "version_0" / "report.html").unlink()
    assert make("version_0", logs=logs) == (0, f"Report: {logs}/version_0/report.html\n", "")
    assert page_of(logs / "version_0") == own
    assert make(0, logs=logs, out=tmp_path / "a.html")[0] == 0
    assert (tmp_path / "a.html").read_bytes().decode() == own


def test_a_run_without_history_is_read_from_its_tensorboard_events(finished, logs, make):
    (logs / "version_0" / "history.json").unlink()
    assert make(0, logs=logs)[::2] == (0, "")
    assert "resumed" not in page_of(logs / "version_0")
    assert losses_of(page_of(logs / "version_0")) == losses_of(page_of(finished.folder))


def test_several_runs_are_compared(finished, logs, make, train):
    options = finished.options | {"trainer.default_root_dir": logs, "model.dropout": 0.3}
    result = train(defaults=options, **{"model.style": "modern"})
    status, out, err = make(0, folder_of(result), logs=logs)
    assert (status, err) == (0, "")
    assert out == f"Report: {logs / 'report.html'}\n"
    elements = Elements((logs / "report.html").read_text(encoding="utf-8"))
    start = elements.rows.index(["Option", "version_0", "version_1"])
    assert [row for row in elements.rows[start + 1 :] if row[0].startswith("model.")] == [
        ["model.dropout", "0.25", "0.3"],
        ["model.style", "classic", "modern"],
    ]
    for name, printed in (("version_0", finished.out), ("version_1", result.out)):
        (row,) = (row for row in elements.rows[:start] if row[0] == name)
        last = re.findall(r"Step: .* (\S+)\n", printed)[-1]
        final = re.search(r"loss: ([\d.]+) .* ([\d.]+) bits per byte\n", printed)
        assert row[3:7] == [last, "6", final[1], final[2]]
    spec = json.loads(elements.attributes("data-chart")[0])
    assert {series["name"]: bool(series["mark"]) for series in spec["series"]} == {
        "version_0": True,
        "version_1": True,
    }


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_curves_are_those_of_the_loggers(train, accumulate):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"model.schedule": "cosine", "trainer.accumulate_grad_batches": accumulate}
    folder = folder_of(train(**options))
    curves = read_history(folder).curves
    events = EventAccumulator(str(folder)).Reload()
    for name in ("train/loss", "learning_rate", "gradient_norm", "val/loss"):
        points = [
            (event.step, pytest.approx(event.value, rel=1e-5)) for event in events.Scalars(name)
        ]
        assert curves[name] == points
    assert [step for step, _ in curves["tokens_per_second"]] == [1, 2, 3, 4, 5, 6]


def test_text_of_others_stays_text(train, text_file):
    """That of the corpus, the prompts, the command and the options."""
    text = HOSTILE[:-1]  # a corpus with a NUL is refused
    text_file.write_text(f"{text}\n" * 200, encoding="utf-8")
    options = {"samples.prompts": json.dumps([text])}
    options["trainer.default_root_dir"] = text_file.parent / "<b>logs"
    page = page_of(folder_of(train(**options)))
    tags = [tag for tag, _ in Elements(page).tags]
    assert tags.count("script") == 1
    final = FinalResult(1.0, 1.0, 1)
    assert set(tags) <= {tag for tag, _ in Elements(run_page(made_up(final=final))).tags}
    assert f"<mark>{escape(text)}</mark>" in page
    assert "&lt;b&gt;logs" in page


def test_every_text_on_both_pages_is_escaped():
    run = made_up(
        card=[(HOSTILE, HOSTILE)],
        prompts=[HOSTILE],
        samples=[(200, [HOSTILE])],
        sessions=[
            Session(0, 0, HOSTILE, {HOSTILE: HOSTILE}),
            Session(5, 0, HOSTILE, {HOSTILE: ""}),
        ],
    )
    hostile = Run(HOSTILE, run.history, {HOSTILE: HOSTILE})
    for page in (run_page(hostile), comparison_page([hostile, made_up()])):
        assert page.count("<script>") == page.count("</script>") == 1
        assert str(escape(HOSTILE)) in page
        assert page.count("</b>") == page.count("<b>")
        for spec in Elements(page).attributes("data-chart"):
            assert json.loads(spec)["data"]


def test_a_killed_run_has_the_same_curves_once_resumed(train, start, tmp_path):
    options = {"trainer.max_steps": 60, "trainer.val_check_interval": 10}
    folders = [tmp_path / name / "version_0" for name in ("whole", "logs")]
    whole = train(**options, **{"trainer.default_root_dir": tmp_path / "whole"})
    killed = start(**options)
    killed.until("Step: 30")
    killed.send(signal.SIGKILL)
    killed.end()
    assert train("--ckpt_path=last", **options).status == 0
    page = page_of(folders[1])
    assert losses_of(page) == whole.steps
    first, second = map(read_history, folders)
    for name in set(first.curves) - {"time", "tokens_per_second"}:
        assert second.curves[name] == first.curves[name], name
    assert (second.samples, second.final) == (first.samples, first.final)
    resumed_at = second.sessions[1].step
    assert [session.step for session in second.sessions] == [0, resumed_at]
    assert resumed_at in (20, 30)
    assert "--ckpt_path=last" in second.sessions[1].command
    assert f"from step {resumed_at}: " in page


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("history.json", b"{", "history.json is damaged or not the history of a run; delete it"),
        ("history.json", None, "has no history.json and no curves in TensorBoard events"),
        ("config.yaml", b"a: [1", "; repair or delete it"),
        ("config.yaml", b"[1, 2]", "cannot read"),
        ("config.yaml", b"\xff\xfe\x00", "config.yaml"),
    ],
)
def test_a_damaged_run_is_one_line(make, tmp_path, name, content, message):
    made_up().history.save(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    status, out, err = make(tmp_path)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        (["7"], {}, "no run '7'; name a folder such as logs/version_0"),
        (["nowhere"], {}, "no run 'nowhere'"),
        ([], {}, "the following arguments are required: runs"),
        (["."], {"out": "nowhere/a.html"}, "cannot write nowhere/a.html: No such file"),
        (["."], {"out": "folder"}, "folder: Is a directory; choose another file with --out"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(make, tmp_path, monkeypatch, runs, options, message):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    made_up().history.save(tmp_path)
    status, out, err = make(*runs, **options)
    assert (status, out) == (2, "")
    error = err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "history.json"]


def test_the_command_starts_without_torch():
    code = (
        "import sys, lit_gpt.reports.report as report\n"
        "report.comparison_page([])\n"
        "print(sorted({'torch', 'lightning', 'tensorboard'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_a_report_that_fails_does_not_end_the_run(train, logs, finished):
    folder = logs / "version_0"
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    options = finished.options | {"trainer.default_root_dir": logs, "trainer.max_steps": 10}
    result = train("--ckpt_path=last", defaults=options)
    assert result.status == 0, result.err
    assert result.out.count("Could not write the report") == 1
    assert "report.html, training goes on: Is a directory" in result.out
    assert [step for step, _ in read_history(folder).curves["val/loss"]] == [0, 2, 4, 6, 8, 10]


def test_a_full_disk_is_said_once(train, monkeypatch):
    """Saving a checkpoint fails soon enough, and ends the run."""

    def save(history: History, folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "history.json"))

    monkeypatch.setattr(History, "save", save)
    result = train()
    assert result.status == 0, result.err
    assert result.out.count("history.json, training goes on: No space left on device") == 1


def test_a_damaged_history_is_made_anew_from_the_events(train, logs, finished):
    (logs / "version_0" / "history.json").write_text("{", encoding="utf-8")
    options = finished.options | {"trainer.default_root_dir": logs, "trainer.max_steps": 8}
    result = train("--ckpt_path=last", defaults=options)
    assert (result.status, result.err) == (0, "")
    assert result.out.count("history.json is damaged") == 1
    before = losses_of(page_of(finished.folder))
    assert losses_of(page_of(logs / "version_0")) == [*before, *result.steps[-1:]]


def test_without_loggers_or_evaluations_there_is_a_report_too(train, tmp_path):
    train(**{"trainer.logger": "false"})
    assert losses_of(page_of(tmp_path / "logs" / "version_0"))
    history = read_history(folder_of(train(**{"trainer.limit_val_batches": 0})))
    assert [step for step, _ in history.curves["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert "val/loss" not in history.curves


@pytest.mark.parametrize(
    ("options", "shown"),
    [({"trainer.max_steps": 9}, "Step 9 of 9"), ({"trainer.max_epochs": 1}, "Step 4, 20")],
)
def test_a_planned_end_is_that_of_steps_alone(train, options, shown):
    result = train(**{"trainer.limit_train_batches": 4} | options)
    page = (result.run.folder / "report.html").read_text(encoding="utf-8")
    assert shown in page


def test_a_trial_run_leaves_none(train, tmp_path):
    assert train(**{"trainer.fast_dev_run": "true"}).status == 0
    assert list(tmp_path.rglob("history.json")) == []
