"""A run's history: what resuming, thinning and the clock do to it, and what it refuses."""

from __future__ import annotations

import json

import pytest

from lit_gpt.errors import UserError
from lit_gpt.reports.history import FinalResult, History, Session, read_history, thin
from lit_gpt.reports.report import Run, duration, run_page

CURVE = [(0, 7.0), (50, 5.5), (100, 4.4), (150, 3.8), (200, 4.2)]


def with_step(step: str) -> str:
    """A history.json with a point at this step."""
    return json.dumps(vars(History())).replace("{}", f'{{"val/loss": [[{step}, 7.1]]}}', 1)


def test_it_is_read_as_it_was_saved(tmp_path):
    history = History({"val/loss": CURVE, "time": [(0, 1.7e9)]}, card=[("Total", "5 tokens")])
    history.sessions = [Session(0, 1.7e9, "python train.py", {"torch": "2.13"})]
    history.add_samples(200, ["The "], ["The end"])
    history.final = FinalResult(3.5, 2.25, 1000)
    history.save(tmp_path)
    assert read_history(tmp_path) == history
    assert (history.best(), history.newest("val/loss")) == ((150, 3.8), (200, 4.2))
    assert history.final.perplexity == pytest.approx(33.115, abs=1e-3)


def test_resuming_replaces_what_came_after_that_step():
    history = History({"val/loss": list(CURVE)}, final=FinalResult(1.0, 1.0, 1))
    history.add_samples(200, ["The "], ["The end"])
    history.sessions = [Session(0, 1.7e9, "python train.py", {})]
    for step in (100, 100, 50):  # the first two were killed before their first evaluation
        history.begin(Session(step, 1.8e9, f"from {step}", {}))
    assert [session.step for session in history.sessions] == [0, 50]
    assert history.curves["val/loss"] == [(0, 7.0), (50, 5.5)]
    assert (history.samples, history.final) == ([], None)
    for value in (5.0, 4.9):
        history.add(100, {"val/loss": value})
    assert history.curves["val/loss"] == [(0, 7.0), (50, 5.5), (100, 4.9)]


def test_the_time_between_two_sessions_does_not_count():
    history = History(curves={"time": [(0, 1010.0), (50, 1030.0), (100, 5007.0)]})
    history.sessions = [Session(0, 1000.0, "", {}), Session(50, 5000.0, "", {})]
    assert history.seconds() == 37
    assert duration(37) == "0:37"
    assert duration(3600 + 61.4) == "1:01:01"


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
    assert len(run_page(Run("long", history, {}))) < 200_000


def test_thinning_twice_is_thinning_once():
    points = [(step, step / 7) for step in range(0, 5000, 3)]
    assert thin(thin(points, 400), 100) == thin(points, 100)
    assert thin(points, 10_000) == points
    assert thin(points, 100)[0] == points[0]
    assert thin(points, 100)[-1] == points[-1]


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"curves": {"val/loss": [[0, 7.1',
        "[]",
        '{"curves": {"val/loss": 3}}',
        "[" * 100_000,
        with_step("1" + "0" * 400),
        with_step("-3"),
        with_step('"x"'),
        b"\xff\xfe",
    ],
)
def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path, content):
    path = tmp_path / "history.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=r"history\.json is damaged or not the history") as error:
        read_history(tmp_path)
    assert error.value.hint.startswith("delete it")
