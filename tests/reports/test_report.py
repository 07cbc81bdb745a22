"""The report of a run: its numbers, its safety, its continuity, and what a browser makes of it."""

from __future__ import annotations

import html
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lit_gpt.callbacks.samples import Samples
from lit_gpt.command import run
from lit_gpt.module import LitGPT
from lit_gpt.reports import report
from lit_gpt.reports.charts import Line, drawn, shorten, ticks
from lit_gpt.reports.history import History, Session, read_history, thin
from lit_gpt.storage import unfinished
from tests.conftest import ROOT, SMALL

HOSTILE = "</script><b>&amp; \"quoted' <script>document.title = 'taken'</script>\u202e猫\x00"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
LIGHT = {"page": "f9f9f7", "validation": "2a78d6", "training": "eb6834"}
DARK = {"page": "131312", "validation": "5b9ff0", "training": "f08a5d"}


class Elements(HTMLParser):
    """What a page is made of: tags with their attributes, rows of tables, text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text, self.in_cell = "", False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("th", "td")


def folder_of(result) -> Path:
    return Path(result.cli.trainer.log_dir)


def page_of(result) -> str:
    return (folder_of(result) / "report.html").read_bytes().decode()  # line ends as they are


def losses_of(page: str) -> list[str]:
    """The lines that the run printed, from the page's table of evaluations."""
    rows = Elements(page).rows
    head = ["Step", "Training loss", "Validation loss", "Perplexity", "Bits per byte"]
    start = rows.index(head) + 1
    return [
        f"Step: {step}, Training Loss: {train}, Validation Loss: {val}"
        for step, train, val, *_ in (row for row in rows[start:] if len(row) == 5)
    ]


@pytest.fixture
def make(capfd, monkeypatch):
    """`make("0", logs=...)`: report.py in this process; its status, output and errors."""
    main = runpy.run_path(str(ROOT / "scripts" / "report.py"))["main"]

    def call(*runs: object, **options: object) -> tuple[int, str, str]:
        words = [*map(str, runs), *(f"--{name}={value}" for name, value in options.items())]
        monkeypatch.setattr("sys.argv", ["report.py", *words])
        capfd.readouterr()
        status = run(main)
        return status, *capfd.readouterr()

    return call


def made_up(**changes) -> report.Run:
    """A run whose curves are easily told apart; the validation loss is best at step 150."""
    val = [(0, 7.0), (50, 5.5), (100, 4.4), (150, 3.8), (200, 4.2)]
    train = [(0, 6.0), (50, 4.5), (100, 3.0), (150, 2.4), (200, 2.2)]
    history = History({"val/loss": val, "train/eval_loss": train})
    history.add_samples(200, ["The "], ["The end"])
    history.sessions = [Session(0, 1.7e9, "python train.py", {"torch": "2.13"})]
    for name, value in changes.items():
        setattr(history, name, value)
    return report.Run("version_0", history, {"model.d_model": "80"})


def with_step(step: str) -> str:
    """A history.json with a point at this step."""
    return json.dumps(vars(History())).replace("{}", f'{{"val/loss": [[{step}, 7.1]]}}', 1)


def test_the_page_has_the_numbers_that_the_run_printed(train):
    result = train()
    assert result.err == ""
    page = page_of(result)
    assert losses_of(page) == result.steps
    text = Elements(page).text
    losses = [(float(line.rpartition(" ")[2]), i) for i, line in enumerate(result.steps) if i]
    best, i = min(losses)
    assert f"{best:.3f}at step {2 * i}" in text
    assert f"best: {best:.3f} at step {2 * i}" in text
    final = re.search(r"loss: ([\d.]+) .*perplexity ([\d.]+), ([\d.]+) bits", result.out)
    assert f"Final validation loss{final[1]}whole split, perplexity {final[2]}" in text
    assert f"Bits per byte{final[3]}whole validation split" in text
    samples = next(c for c in result.cli.trainer.callbacks if isinstance(c, Samples))
    assert len(samples.texts) == 3
    for sample, prompt in zip(samples.texts, samples.beginnings, strict=True):
        assert f"<mark>{prompt}</mark>{html.escape(sample[len(prompt) :])}</div>" in page
    rows = [": ".join(row) for row in Elements(page).rows]
    assert rows[rows.index(result.out.splitlines()[0]) :][:8] == result.out.splitlines()[:8]


def test_it_has_options_versions_and_the_command(train, text_file):
    text = Elements(page_of(result := train(**{"model.dropout": 0.25}))).text
    assert "model.dropout 0.25" in text
    assert f"data.path {text_file}" in text
    assert f"python train.py --data.path={text_file}" in text
    assert f"torch{__import__('torch').__version__}" in text
    assert read_history(folder_of(result)).sessions[0].step == 0


def test_the_curves_are_those_of_the_loggers(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for options in ({}, {"trainer.accumulate_grad_batches": 3}):
        folder = folder_of(train(**options, **{"model.schedule": "cosine"}))
        curves = read_history(folder).curves
        events = EventAccumulator(str(folder)).Reload()
        for name in ("train/loss", "learning_rate", "gradient_norm", "val/loss"):
            points = [(event.step, event.value) for event in events.Scalars(name)]
            assert curves[name] == [
                (step, pytest.approx(value, rel=1e-5)) for step, value in points
            ]
        assert [step for step, _ in curves["tokens_per_second"]] == [1, 2, 3, 4, 5, 6]


def test_the_page_loads_nothing(train):
    page = page_of(train())
    assert re.findall(r"https?:|url\(|@import", page) == []
    for tag, attributes in Elements(page).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action"} & set(attributes)


def test_text_of_others_stays_text(train, text_file):
    """That of the corpus, the prompts, the command and the options."""
    text = HOSTILE[:-1]  # a corpus with a NUL is refused
    text_file.write_text(f"{text}\n" * 200, encoding="utf-8")
    options = {"samples.prompts": json.dumps([text])}
    options["trainer.default_root_dir"] = text_file.parent / "<b>logs"
    page = page_of(train(**options))
    tags = [tag for tag, _ in Elements(page).tags]
    assert tags.count("script") == 1
    assert set(tags) <= {tag for tag, _ in Elements(report.run_page(made_up())).tags}
    assert f"<mark>{html.escape(text)}</mark>" in page
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
    hostile = report.Run(HOSTILE, run.history, {HOSTILE: HOSTILE})
    for page in (report.run_page(hostile), report.comparison_page([hostile, made_up()])):
        assert page.count("<script>") == page.count("</script>") == 1
        assert html.escape(HOSTILE) in page
        assert page.count("</b>") == page.count("<b>")


def test_a_killed_run_that_goes_on_has_the_curves_of_one_never_killed(text_file, tmp_path):
    options = SMALL | {"data.path": text_file, "data.cache": tmp_path / "cache"}
    options |= {"trainer.max_steps": 60, "trainer.val_check_interval": 10}
    words = [sys.executable, "-u", str(ROOT / "scripts" / "train.py")]
    words += [f"--{name}={value}" for name, value in options.items()]

    def start(logs: str, *more: str) -> subprocess.Popen:
        where = f"--trainer.default_root_dir={tmp_path / logs}"
        return subprocess.Popen([*words, where, *more], stdout=subprocess.PIPE, text=True)

    whole = start("whole").communicate()[0]
    process = start("killed")
    for line in process.stdout:
        if line.startswith("Step: 30"):
            os.kill(process.pid, signal.SIGKILL)
            break
    process.communicate()
    assert start("killed", "--ckpt_path=last").wait() == 0
    first, second = (tmp_path / logs / "version_0" for logs in ("whole", "killed"))
    page = (second / "report.html").read_text(encoding="utf-8")
    assert losses_of(page) == [x for x in whole.splitlines() if x.startswith("Step: ")]
    first, second = read_history(first), read_history(second)
    for name in set(first.curves) - {"time", "tokens_per_second"}:
        assert second.curves[name] == first.curves[name], name
    assert (second.samples, second.final) == (first.samples, first.final)
    begun = second.sessions[1].step
    assert [session.step for session in second.sessions] == [0, begun]
    assert begun in (20, 30)
    assert "--ckpt_path=last" in second.sessions[1].command
    assert f"from step {begun}: " in page


def test_what_came_after_the_step_gone_on_from_is_replaced():
    history = made_up().history
    history.final = dict.fromkeys(("loss", "bits_per_byte", "num_tokens"), 1.0)
    for step in (100, 100, 50):  # the first two came to nothing
        history.begin(Session(step, 1.8e9, f"from {step}", {}))
    assert [session.step for session in history.sessions] == [0, 50]
    assert history.curves["val/loss"] == [(0, 7.0), (50, 5.5)]
    assert (history.samples, history.final) == ([], None)
    for value in (5.0, 4.9):
        history.add(100, {"val/loss": value})
    assert history.curves["val/loss"] == [(0, 7.0), (50, 5.5), (100, 4.9)]


def test_time_does_not_run_between_two_sessions():
    history = History(curves={"time": [(0, 1010.0), (50, 1030.0), (100, 5007.0)]})
    history.sessions = [Session(0, 1000.0, "", {}), Session(50, 5000.0, "", {})]
    assert history.seconds() == 37
    assert report.duration(37) == "0:37"
    assert report.duration(3600 + 61.4) == "1:01:01"


def test_a_run_of_100_000_steps_stays_small(tmp_path):
    history = History()
    for step in range(0, 100_001, 10):
        values = {"train/loss": 5 + step % 3, "learning_rate": 1e-3, "tokens_per_second": 1e4}
        history.add(step, values | {"gradient_norm": 1.2345})
        if step % 500 == 0:
            history.add(step, {"val/loss": 2 + step**-0.5 if step else 7, "train/eval_loss": 2})
            history.add_samples(step, ["The "], ["The cat sat on the mat, and so on"] * 3)
            history.save(tmp_path)
    assert (tmp_path / "history.json").stat().st_size < 300_000
    assert read_history(tmp_path).curves["val/loss"] == history.curves["val/loss"]
    assert len(history.curves["val/loss"]) == 201
    steps = [step for step, _ in history.curves["train/loss"]]
    assert (steps[0], steps[-1]) == (0, 100_000)
    assert 1000 <= len(steps) <= 2001
    page = report.run_page(report.Run("long", history, {}))
    assert len(page) < 200_000


def test_thinning_twice_is_thinning_once():
    points = [(step, step / 7) for step in range(0, 5000, 3)]
    assert thin(thin(points, 400), 100) == thin(points, 100)
    assert thin(points, 10_000) == points
    assert thin(points, 100)[0] == points[0]
    assert thin(points, 100)[-1] == points[-1]


def test_what_is_drawn_keeps_the_extremes_and_leaves_out_what_is_no_number():
    points = [(step, 5.0) for step in range(3000)]
    points[1234], points[77] = (1234, 9.0), (77, float("nan"))
    few = drawn(Line("", points))
    assert len(few) <= 802
    assert (1234, 9.0) in few
    assert all(value == value for _, value in few)
    assert max(value for _, value in drawn(Line("", points, faint=True))) < 6


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        ((0, 500), [0, 100, 200, 300, 400, 500]),
        ((0, 100_000), [0, 20_000, 40_000, 60_000, 80_000, 100_000]),
        ((2.71, 7.3), [3, 4, 5, 6, 7]),
        ((0, 0.006), [0, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006]),
        ((3.0, 3.0001), [3.0, 3.00002, 3.00004, 3.00006, 3.00008, 3.0001]),
        ((-1, 1), [-1, -0.5, 0, 0.5, 1]),
    ],
    ids=str,
)
def test_axes_have_round_numbers(span, expected):
    assert ticks(*span, 5) == pytest.approx(expected, abs=1e-12)


def test_numbers_on_axes_are_short():
    numbers = (0, 0.006, 1e-5, 3.5, 5000, 20_000, 150_000, 1_500_000)
    shown = "0 0.006 1e-05 3.5 5,000 20,000 150k 1.5M"
    assert " ".join(map(shorten, numbers)) == shown


def test_several_runs_are_laid_over_each_other(train, make, tmp_path):
    results = [train(), train(**{"model.dropout": 0.3, "model.style": "modern"})]
    status, out, err = make(0, folder_of(results[1]), logs=tmp_path / "logs")
    assert (status, err) == (0, "")
    assert out == f"Report: {tmp_path / 'logs' / 'report.html'}\n"
    page = (tmp_path / "logs" / "report.html").read_text(encoding="utf-8")
    rows = Elements(page).rows
    start = rows.index(["Option", "version_0", "version_1"])
    assert rows[start + 1 :] == [
        ["model.dropout", "0.1", "0.3"],
        ["model.style", "classic", "modern"],
    ]
    for name, result in zip(("version_0", "version_1"), results, strict=True):
        (row,) = (row for row in rows[:start] if row[0] == name)
        last = result.steps[-1].rpartition(" ")[2]
        final = re.search(r"loss: ([\d.]+) .* ([\d.]+) bits per byte\n", result.out)
        assert row[3:7] == [last, "6", final[1], final[2]]
    assert page.count('class="best c0') == page.count('class="best c1') == 1


def test_the_report_of_one_run_is_that_of_the_run(train, make, tmp_path):
    result = train()
    own = page_of(result)
    (folder_of(result) / "report.html").unlink()
    assert make("version_0", logs=tmp_path / "logs")[0] == 0
    assert page_of(result) == own
    assert make(0, logs=tmp_path / "logs", out=tmp_path / "a.html")[0] == 0
    assert (tmp_path / "a.html").read_bytes().decode() == own


def test_a_run_made_before_there_were_reports_has_one(train, make, tmp_path):
    result = train()
    for name in ("history.json", "report.html"):
        (folder_of(result) / name).unlink()
    assert make(0, logs=tmp_path / "logs")[::2] == (0, "")
    assert losses_of(page_of(result)) == result.steps


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("history.json", "", "history.json is damaged or no history of a run"),
        ("history.json", '{"curves": {"val/loss": [[0, 7.1', "history.json is damaged"),
        ("history.json", "[]", "history.json is damaged"),
        ("history.json", '{"curves": {"val/loss": 3}}', "history.json is damaged"),
        ("history.json", "[" * 100_000, "history.json is damaged"),
        ("history.json", with_step("1" + "0" * 400), "history.json is damaged"),
        ("history.json", with_step("-3"), "history.json is damaged"),
        ("history.json", with_step('"x"'), "history.json is damaged"),
        ("history.json", b"\xff\xfe", "history.json is damaged"),
        ("history.json", None, "has no history.json and no curves in TensorBoard events"),
        ("config.yaml", "a: [1", "config.yaml is no YAML: mend or delete it"),
        ("config.yaml", "[1, 2]", "cannot read"),
        ("config.yaml", b"\xff\xfe\x00", "config.yaml"),
    ],
)
def test_a_damaged_run_is_one_line(make, tmp_path, name, content, message):
    made_up().history.save(tmp_path)
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content or b"")
    if content is None:
        (tmp_path / name).unlink()
    status, out, err = make(tmp_path)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        (["7"], {}, "no run '7': name a folder such as"),
        (["nowhere"], {}, "no run 'nowhere'"),
        ([], {}, "the following arguments are required: RUN"),
        (["."], {"out": "nowhere/a.html"}, "cannot write nowhere/a.html: No such file"),
        (["."], {"out": "folder"}, "cannot write folder: Is a directory; name another file"),
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


def test_a_report_that_fails_does_not_end_the_run(train):
    folder = folder_of(train())
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    result = train("--ckpt_path=last", **{"trainer.max_steps": 10})
    assert result.status == 0, result.err
    assert result.out.count("No report is written: IsADirectoryError") == 1
    assert [step for step, _ in read_history(folder).curves["val/loss"]] == [0, 2, 4, 6, 8, 10]


def test_a_full_disk_is_said_as_for_checkpoints(train):
    folder = folder_of(train())
    unfinished(folder / "history.json").symlink_to("/dev/full")
    result = train("--ckpt_path=last", **{"trainer.max_steps": 10})
    assert result.status == 2
    assert result.err.startswith("error: no space left on the disk for ")
    assert "history.json: make room" in result.err


def test_a_damaged_history_begins_anew(train):
    folder = folder_of(train())
    (folder / "history.json").write_text("{", encoding="utf-8")
    result = train("--ckpt_path=last", **{"trainer.max_steps": 8})
    assert (result.status, result.err) == (0, "")
    assert result.out.count("The history of the run begins anew: ") == 1
    assert losses_of(page_of(result)) == result.steps[-1:]


def test_without_loggers_or_evaluations_there_is_a_report_too(train, tmp_path):
    train(**{"trainer.logger": "false"})
    assert losses_of((tmp_path / "logs" / "version_0" / "report.html").read_text("utf-8"))
    history = read_history(folder_of(train(**{"trainer.limit_val_batches": 0})))
    assert [step for step, _ in history.curves["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert "val/loss" not in history.curves


def test_a_trial_run_leaves_none(train, tmp_path):
    assert train(**{"trainer.fast_dev_run": "true"}).status == 0
    assert list(tmp_path.rglob("history.json")) == []


def test_the_newest_values_are_kept_without_a_logger():
    model = LitGPT(vocab_size=300, context_length=8, d_model=16, num_blocks=1, num_heads=2)
    assert model.curves == {}


def browse(url: Path, folder: Path, *options: str) -> subprocess.CompletedProcess:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    quiet = ["gpu", "quic", "background-networking", "component-update", "sync", "extensions"]
    words = [CHROMIUM, "--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars"]
    words += [*(f"--disable-{name}" for name in quiet), "--enable-logging=stderr"]
    words += [f"--user-data-dir={folder / 'profile'}", *options, url.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_a_browser_shows_the_curves(tmp_path, colors):
    """Each evaluation's dot is where its step and its loss belong, in the colour of its curve."""
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "report.html").write_text(report.run_page(made_up()), encoding="utf-8")
    options = ["--window-size=1000,660", f"--screenshot={tmp_path / 'shot.png'}"]
    options += ["--force-dark-mode"] if colors is DARK else []
    done = browse(tmp_path / "report.html", tmp_path, *options)
    assert "CONSOLE" not in done.stderr  # neither errors of the script nor of the policy
    shot = image.open(tmp_path / "shot.png").convert("RGB")
    page, blue, orange = (tuple(bytes.fromhex(color)) for color in colors.values())
    assert shot.getpixel((3, 3)) == page

    def places(color: tuple[int, int, int]) -> list[tuple[int, int]]:
        """Below the legend."""
        top = min(y for y in range(200, 660) for x in range(900) if shot.getpixel((x, y)) == blue)
        box = ((x, y) for x in range(1000) for y in range(top + 12, 660))
        return [place for place in box if shot.getpixel(place) == color]

    curves = made_up().history.curves
    found = places(orange)  # alone in its corners: from its ends follows all the rest
    left, right = min(x for x, _ in found) + 3, max(x for x, _ in found) - 3
    top, bottom = min(y for _, y in found) + 3, max(y for _, y in found) - 3
    (start, high), *_, (end, low) = curves["train/eval_loss"]
    for name, color in (("val/loss", blue), ("train/eval_loss", orange)):
        there = set(places(color))
        for step, loss in curves[name]:
            x = left + (right - left) * (step - start) / (end - start)
            y = top + (bottom - top) * (high - loss) / (high - low)
            near = {(round(x) + i, round(y) + j) for i in (-1, 0, 1) for j in (-1, 0, 1)}
            assert near & there, (name, step)
    x = left + (right - left) * 150 / 200
    y = top + (bottom - top) * (high - 3.8) / (high - low)
    ring = {(round(x) + i, round(y) + j) for i in (-6, 6) for j in (-1, 0, 1)}
    assert ring & set(places(blue))  # the best step is marked


def test_a_browser_runs_the_pages_script_and_no_other(tmp_path):
    run = made_up(samples=[(200, [HOSTILE])])
    page = report.run_page(report.Run(HOSTILE, run.history, {}))
    injected = "<script>document.title = 'taken'</script></body>"
    for number, content in enumerate((page, page.replace("</body>", injected))):
        path = tmp_path / f"{number}.html"
        path.write_text(content, encoding="utf-8")
        done = browse(path, tmp_path, "--dump-dom")
        assert 'class="tip"' in done.stdout
        assert "<title>taken" not in done.stdout
        refused = "violates the following Content Security Policy" in done.stderr
        assert refused == (number == 1)
