"""The sweep: real trials in real processes, killed and gone on with; one line for each mistake."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from html import unescape
from pathlib import Path

import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lit_gpt.command import run as run_command
from lit_gpt.errors import UserError
from lit_gpt.tuning.search_space import read_sweep
from lit_gpt.tuning.sweep import main, open_study, option_name
from tests.conftest import ALIASES, ROOT, SMALL

SPACES = {
    "model.learning_rate": {"low": 1e-3, "high": 3e-2, "log": True},
    "model.num_blocks": {"low": 1, "high": 2},
    "model.d_model": [16, 24],
}


@pytest.fixture
def sweep_file(text_file: Path, tmp_path: Path):
    """`sweep_file(trials=3)`: a sweep over small models; what is given stands instead."""

    def write(**changes) -> Path:
        fixed = {k: v for k, v in SMALL.items() if k not in SPACES}
        fixed |= {"data.path": str(text_file), "data.cache": str(tmp_path / "cache")}
        content = {"options": SPACES, "fixed": fixed, "trials": 3, "study": str(tmp_path / "study")}
        content |= changes
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        return path

    return write


def command(path: Path, *words: object) -> list[str]:
    script = str(ROOT / "scripts" / "sweep.py")
    return [sys.executable, "-u", script, f"--config={path}", *map(str, words)]


def run(path: Path, *words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(path, *words), capture_output=True, text=True, cwd=ROOT, timeout=300
    )


@pytest.fixture
def sweep_here(capfd, monkeypatch):
    """The same in this process, whose trials then all come from one warm process."""

    monkeypatch.setattr("sys.argv", ["sweep.py"])  # how the commands that it prints begin

    def run(path: Path, *more: str) -> subprocess.CompletedProcess:
        capfd.readouterr()
        status = run_command(lambda: main([f"--config={path}", *more]), option_name)
        return subprocess.CompletedProcess([], status, *capfd.readouterr())

    return run


def rows(out: str) -> list[list[str]]:
    """The table, without its frame."""
    found = re.findall(r"^│ (.*) │$", out, re.M)
    return [[cell.strip() for cell in line.split("│")] for line in found]


def start_and_wait_for(path: Path, line: str) -> tuple[subprocess.Popen, list[str]]:
    process = subprocess.Popen(
        command(path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    printed: list[str] = []
    for text in process.stdout:
        printed.append(text.rstrip())
        if text.startswith(line):
            return process, printed
    raise AssertionError(printed)


def children_of(pid: int) -> list[int]:
    """All processes below it."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    parents = [tuple(map(int, row.split())) for row in listed.splitlines()[1:]]
    found = [pid]
    for parent in found:
        found += [child for child, its in parents if its == parent]
    return found[1:]


def kill_in_second_trial(path: Path, folder: Path) -> list[str]:
    """Starts the sweep and kills it there; what it printed before. Its runs end with it."""
    process, printed = start_and_wait_for(path, "Trial 2 of 3")
    trial = folder / "trial_2.txt"
    while not trial.exists() or "Step: 2," not in trial.read_text(encoding="utf-8"):
        time.sleep(0.05)
    below = children_of(process.pid)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/exe").exists() for pid in below) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert below
    assert not [pid for pid in below if Path(f"/proc/{pid}/exe").exists()]
    return printed


def test_killed_it_goes_on(sweep_file, sweep_here, tmp_path):
    """SIGKILL in the second trial: the first is kept, the second tried again, then the third."""
    path = sweep_file()
    before = kill_in_second_trial(path, tmp_path / "study")
    resumed = sweep_here(path)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    lines = resumed.stdout.splitlines()
    tried = [line for line in lines if line.startswith("Trial")]
    assert [line[:12] for line in tried] == ["Trial 2 of 3", "Trial 3 of 3"]
    assert tried[0] == before[-1]
    table = rows(resumed.stdout)
    assert sorted(row[1] for row in table) == ["1", "2", "3"]
    assert f"  bits per byte: {next(row[5] for row in table if row[1] == '1')}" == before[1]
    assert table[0][5] == min(row[5] for row in table)
    assert lines[-2].startswith(f"Best: {table[0][5]} bits per byte (")
    tried = zip(sorted(SPACES), table[0][2:5], strict=True)  # as YAML sorts them
    assert lines[-1].startswith("python scripts/train.py --")
    assert lines[-1].endswith("".join(f" --{name}={value}" for name, value in tried))
    page = (tmp_path / "study" / "sweep.html").read_text(encoding="utf-8")
    specs = [json.loads(unescape(spec)) for spec in re.findall(r'data-chart="([^"]+)"', page)]
    assert [spec["x"] for spec in specs] == ["trial", *sorted(SPACES)]
    found = sorted(float(row[5]) for row in table)
    assert sorted(specs[0]["data"][-1]) == pytest.approx(found, abs=1e-4)
    asked = sweep_here(path)  # there is nothing left to do
    assert rows(asked.stdout) == table
    assert "Trial 1" not in asked.stdout


@pytest.mark.slow
def test_killed_it_ends_as_if_it_had_not_been_and_so_does_the_best_run(sweep_file, tmp_path):
    straight = run(sweep_file(study=str(tmp_path / "straight")))
    assert (straight.returncode, straight.stderr) == (0, "")
    path = sweep_file()
    kill_in_second_trial(path, tmp_path / "study")
    resumed = run(path)
    table = rows(resumed.stdout)
    assert [row[:-1] for row in table] == [row[:-1] for row in rows(straight.stdout)]
    words = shlex.split(resumed.stdout.splitlines()[-1])
    assert words[:2] == ["python", "scripts/train.py"]
    again = subprocess.run(
        [sys.executable, *words[1:], f"--trainer.default_root_dir={tmp_path / 'logs'}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert f"{table[0][5]} bits per byte" in again.stdout


@pytest.mark.slow
def test_ctrl_c_shows_what_there_is_and_how_to_go_on(sweep_file, tmp_path):
    path = sweep_file(trials=50)
    process, _ = start_and_wait_for(path, "Trial 2 of 50")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [row[1] for row in rows(out)] == ["1"]
    last = out.splitlines()[-1]
    assert last == f"Stopped. Continue:  python scripts/sweep.py --config={path}"
    assert "Traceback" not in out


def test_trials_that_fail_are_told_and_the_rest_goes_on(sweep_file, sweep_here, tmp_path):
    """Learning rates of 1e30 and more give a non-finite loss; 1e-3 does not. Pairs come once."""
    path = sweep_file(options={"model.learning_rate": [1e-3, 1e30]}, trials=5)
    result = sweep_here(path)
    assert result.returncode == 0, result.stderr
    assert "failed: non-finite loss or gradient at step" in " ".join(result.stdout.split())
    table = rows(result.stdout)
    ranked = [row for row in table if row[0]]
    assert {row[2] for row in ranked} == {"0.001"}
    assert len({row[-1] for row in ranked}) == 1  # the same options are run once
    assert "--model.learning_rate=0.001" in result.stdout.splitlines()[-1]
    assert (
        (tmp_path / "study" / "trial_1.txt").read_text(encoding="utf-8").startswith("Text length")
    )


def test_without_a_single_result_it_is_an_error(sweep_file, sweep_here, tmp_path):
    path = sweep_file(options={"model.learning_rate": [1e30, 1e31]}, trials=1)
    result = sweep_here(path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        "error: none of 1 trials was completed; the last one: failed: non-finite"
    )
    assert str(tmp_path / "study" / "trial_1.txt") in line


def test_bad_trials_are_pruned(sweep_file, sweep_here):
    """After five that came to their end, one far above their median ends at an evaluation."""
    rates = [3e-2, 2.9e-2, 2.8e-2, 2.7e-2, 2.6e-2, 1e-9, 1.1e-9, 1.2e-9, 1.3e-9]
    path = sweep_file(options={"model.learning_rate": rates}, trials=8)
    result = sweep_here(path, "--trainer.max_steps=12")
    assert result.returncode == 0, result.stderr
    pruned = [row for row in rows(result.stdout) if "pruned" in row[3]]
    assert pruned
    for row in pruned:
        assert float(row[2]) < 1e-8
        assert re.fullmatch(r"\d\.\d{4}, pruned at step (4|6|8|10)", row[3])


MISTAKES = {
    "no options": ({"options": {}}, "options is empty: give at least one"),
    "an unknown option": ({"options": {"model.size": [1, 2]}}, "--model.size"),
    "a value": ({"options": {"model.style": ["classic", "baroque"]}}, "'baroque': must be one of"),
    "an end": (
        {"options": {"model.dropout": {"low": 0.0, "high": 1.0}}},
        "--model.dropout 1.0: must be in [0, 1)",
    ),
    "a missing text": ({"fixed": {"data.path": "nowhere.txt"}}, "no such file or folder"),
    "devices": ({"fixed": {"trainer.devices": 2, "trainer.accelerator": "cpu"}}, "on one device"),
    "twice": ({"fixed": {"model.d_model": 16}}, "--model.d_model: has a fixed value, but"),
    "the folder": ({"fixed": {"trainer.default_root_dir": "x"}}, "can't be given to a sweep"),
    "a key": ({"option": {}}, "unknown key 'option': a sweep has options, fixed, trials, study"),
    "trials": ({"trials": 0}, "trials (--trials) must be at least 1, not 0"),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_line_before_the_first_trial(
    sweep_file, sweep_here, changes, message, tmp_path
):
    if "options" not in changes and "fixed" in changes:
        changes = {"options": {"model.d_model": [16, 24]}, **changes}
    path = sweep_file(**changes)
    result = sweep_here(path)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert str(path) in line or "can't be given" in line
    assert message in line
    assert not (tmp_path / "study").exists()


def space(path: Path, value: object):
    path.write_text(yaml.safe_dump({"options": {"model.x": value}}), encoding="utf-8")
    return read_sweep(str(path), None, None, []).spaces["model.x"]


def test_spaces_are_read_as_written(tmp_path):
    path = tmp_path / "s.yaml"
    choices = ("64", "0.5", "true", "null", "a", "[1, 2]")
    written = [64, 0.5, True, None, "a", [1, 2], 64]
    assert space(path, written) == CategoricalDistribution(choices)
    assert space(path, {"low": 1, "high": 8}) == IntDistribution(1, 8)
    assert space(path, {"low": 1, "high": 9, "step": 2}) == IntDistribution(1, 9, step=2)
    assert space(path, {"low": 0, "high": 0.3}) == FloatDistribution(0.0, 0.3)
    found = space(path, {"low": "1e-4", "high": 1e-2, "log": True})
    assert found == FloatDistribution(1e-4, 1e-2, log=True)
    numbers = "low, high and step must be numbers, and log true or false"
    for wrong, words in (
        ([], "must be a list of values, or a range"),
        (3, "must be a list of values, or a range"),
        ({"low": 1}, "must be a list of values, or a range"),
        ({"low": 2, "high": 1}, "low must be below high"),
        ({"low": 0.0, "high": 1.0, "log": True}, "log needs a low above 0"),
        ({"low": 1, "high": 2, "logarithmic": True}, "must be a list of values, or a range"),
        ({"low": 1, "high": 2, "log": "yes please"}, numbers),
        ({"low": 1, "high": 2, "step": 0}, "step must be above 0"),
        ({"low": "wide", "high": 2}, numbers),
        ({"low": 1, "high": float("inf")}, numbers),
    ):
        with pytest.raises(UserError, match=re.escape(words)) as error:
            space(path, wrong)
        assert str(error.value).endswith(f", not {json.dumps(wrong, sort_keys=True)}")
        assert f"config '{path}': options: model.x" in str(error.value)


def test_the_command_line_wins_over_the_file(sweep_file, tmp_path):
    more = ["--trainer.max_steps", "3", "--model.style=modern"]
    plan = read_sweep(str(sweep_file()), 7, "elsewhere", more)
    assert (plan.trials, plan.folder) == (7, Path("elsewhere"))
    argv = plan.argv({"model.d_model": "16"})
    assert argv.count("--trainer.max_steps=3") == 1
    assert "--trainer.max_steps=6" not in argv
    assert argv[-1] == "--model.d_model=16"
    for wrong in (["--trainer.max_steps"], ["trainer.max_steps=3"], ["--model.d_model=16"]):
        with pytest.raises(UserError, match=re.escape(wrong[0].partition("=")[0].lstrip("-"))):
            read_sweep(str(sweep_file()), 7, None, wrong)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"options: [", "is not a YAML file"),
        (b"\xff\xfe\x00", "is not a YAML file"),
        (b"3", "does not describe a sweep"),
        (ALIASES.encode() + b"options: *x8", "too many values"),
    ],
)
def test_files_that_are_no_sweep(content, words, tmp_path):
    path = tmp_path / "s.yaml"
    with pytest.raises(UserError, match=r"can't be read: No such file"):
        read_sweep(str(path), None, None, [])
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_sweep(str(path), None, None, [])


def test_our_own_sweep_can_be_read():
    plan = read_sweep(str(ROOT / "configs" / "sweep.yaml"), None, None, [])
    assert (plan.trials, plan.folder) == (20, Path("logs/sweep"))
    assert plan.argv({})[0] == "--config=configs/modern.yaml"


def test_studies_that_cannot_be_gone_on_with(sweep_file, tmp_path):
    def opened(path: Path, *more: str) -> int:
        with open_study(read_sweep(str(path), None, None, list(more))) as study:
            return len(study.trials)

    path = sweep_file()
    assert opened(path) == opened(path) == 0
    with pytest.raises(UserError, match="max_steps is 6 there and 9 here; give the same options"):
        opened(path, "--trainer.max_steps=9")
    words = "belongs to a different sweep: model.d_model is one of 16, 24 there and one of 16 here"
    with pytest.raises(UserError, match=words):
        opened(sweep_file(options=SPACES | {"model.d_model": [16]}))
    holder = open_study(read_sweep(str(sweep_file()), None, None, []))
    with holder, pytest.raises(UserError, match="another process is using"):
        opened(path)
    (tmp_path / "study" / "study.db").write_bytes(b"not a database, but long enough to be one")
    with pytest.raises(UserError, match=r"study.db can't be used as a study: .*not a database"):
        opened(sweep_file())
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="can't use the folder"):
        opened(sweep_file(study=str(tmp_path / "file" / "study")))


def test_without_optuna_it_says_what_to_install(tmp_path):
    (tmp_path / "optuna.py").write_text("raise ModuleNotFoundError('No module', name='optuna')")
    result = subprocess.run(
        command(ROOT / "configs" / "sweep.yaml"),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        'error: optuna is missing, which a sweep needs; pip install -e ".[sweep]"\n'
    )
