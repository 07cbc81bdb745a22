"""A run's loggers: continued when it resumes, started first, and no reason to end it."""

from __future__ import annotations

import csv
import json
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger


def csv_logger(tmp_path: Path, name: str = "curves") -> dict:
    options = {"trainer.logger": "CSVLogger", "trainer.logger.save_dir": tmp_path / "csv"}
    return options | {"trainer.logger.name": name}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(path: Path, name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[name])) for row in rows(path) if row.get(name)]


def test_a_resumed_run_goes_on_in_metrics_csv(train, tmp_path):
    """As if it had never stopped; the rows after the checkpoint are trained again."""
    whole = train(**csv_logger(tmp_path, "whole"), **{"trainer.max_steps": 8})
    train(**csv_logger(tmp_path), **{"trainer.max_steps": 4})
    path = tmp_path / "csv" / "curves" / "version_0" / "metrics.csv"
    with path.open("a") as file:
        keys = file and rows(path)[0].keys()
        file.write(",".join("99" if key == "step" else "1.5" for key in keys) + "\r\n1.5,2")
    result = train(ckpt_path="last", **csv_logger(tmp_path), **{"trainer.max_steps": 8})
    assert (whole.status, result.status) == (0, 0), result.err
    assert "Resumed with different" not in result.out
    assert [p.name for p in path.parent.parent.iterdir()] == ["version_0"]
    expected = tmp_path / "csv" / "whole" / "version_0" / "metrics.csv"
    for name in ("train/loss", "val/loss", "learning_rate"):
        assert numbers(path, name) == numbers(expected, name)
    assert [step for step, _ in numbers(path, "train/loss")] == [*range(1, 9)]
    assert [step for step, _ in numbers(path, "val/loss")] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    "changed",
    [{"trainer.logger.name": "others"}, {"trainer.default_root_dir": "elsewhere"}],
    ids=["another name", "another run"],
)
def test_another_run_has_curves_of_its_own(train, tmp_path, places, changed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(**csv_logger(tmp_path), **{"trainer.max_steps": 4})
    first = tmp_path / "csv" / "curves" / "version_0" / "metrics.csv"
    before = first.read_bytes()
    last = places["trainer.default_root_dir"] / "version_0" / "checkpoints" / "last.ckpt"
    options = {**csv_logger(tmp_path), "ckpt_path": last, "trainer.max_steps": 6, **changed}
    assert train(**options).status == 0
    assert first.read_bytes() == before
    assert len([*(tmp_path / "csv").rglob("metrics.csv")]) == 2


def test_config_yaml_names_no_run_to_continue(train, tmp_path):
    """Or else a new run with it would go on in the curves of this one."""
    train(**csv_logger(tmp_path), **{"trainer.max_steps": 4})
    run = train(ckpt_path="last", **csv_logger(tmp_path), **{"trainer.max_steps": 6}).run
    again = train("--config", str(run.folder / "config.yaml"), defaults={})
    assert again.status == 0, again.err
    assert (tmp_path / "csv" / "curves" / "version_1" / "metrics.csv").exists()


def test_a_tensorboard_logger_of_ones_own_is_continued(train, tmp_path):
    options = {"trainer.logger": "TensorBoardLogger", "trainer.logger.save_dir": tmp_path / "tb"}
    first = train(**options, **{"trainer.max_steps": 4})
    last = first.run.folder / "checkpoints" / "last.ckpt"
    second = train(ckpt_path=last, **options, **{"trainer.max_steps": 6})
    assert second.status == 0, second.err
    assert second.run.folder == first.run.folder == tmp_path / "tb" / "lightning_logs" / "version_0"


class Recorder(Logger):
    """A logger with an id, as those of services have it."""

    made: ClassVar[list[Recorder]] = []

    def __init__(self, project: str = "p", version: str | None = None) -> None:
        super().__init__()
        self.project = project
        self._version = version
        self.metrics: list[tuple[int, dict]] = []
        Recorder.made.append(self)

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str | None:
        return self._version

    @property
    def experiment(self) -> Recorder:
        self._version = self._version or f"id{len(Recorder.made)}"
        return self

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        self.metrics.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs) -> None:
        pass


class Keyless(Recorder):
    @property
    def experiment(self) -> Recorder:
        raise RuntimeError("No API key configured. Use `login` to log in.\nmore lines")


class Failing(Recorder):
    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        raise ConnectionError("the service is down")


@pytest.fixture
def service(monkeypatch):
    """Options of a logger that stands for W&B's: the module `service` has these classes."""
    module = types.ModuleType("service")
    for kind in (Recorder, Keyless, Failing):
        monkeypatch.setattr(kind, "__module__", "service")
        setattr(module, kind.__name__, kind)
    module.WandbLogger = type("WandbLogger", (Recorder,), {"__module__": "service"})
    monkeypatch.setitem(sys.modules, "service", module)
    Recorder.made.clear()
    return lambda name, **options: {"trainer.logger": f"service.{name}"} | options


def test_a_resumed_run_is_the_same_run_of_the_service(train, service):
    run = train(**service("WandbLogger"), **{"trainer.max_steps": 2}).run
    assert json.loads((run.folder / "loggers.json").read_text())[0]["id"] == "id1"
    train(ckpt_path="last", **service("WandbLogger"), **{"trainer.max_steps": 4})
    train(ckpt_path=run.folder / "checkpoints" / "best.ckpt", **service("WandbLogger"))
    train(**service("WandbLogger"), **{"trainer.max_steps": 2})
    other = {"trainer.logger.project": "q", "trainer.max_steps": 8}
    assert train(ckpt_path="last", **service("WandbLogger", **other)).status == 0
    assert [logger.version for logger in Recorder.made] == ["id1", "id1", "id3", "id4", "id5"]


def test_a_logger_that_cant_start_is_one_line(train, service):
    result = train(**service("Keyless"))
    assert result.status == 2
    assert result.err == (
        "error: Keyless can't start: No API key configured. Use 'login' to log in.; leave out "
        "--trainer.logger, or choose another\n"
    )
    assert result.steps == []


def test_a_logger_that_fails_later_is_said_once(train, service):
    plain = train()
    result = train(**service("Failing"))
    assert result.status == 0, result.err
    assert result.steps == plain.steps
    line = "Failing can't log, training goes on: the service is down"
    assert [x for x in result.out.splitlines() if x.startswith("Failing")] == [line]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("wrapped")])
def test_ctrl_c_while_a_logger_starts_is_130(train, service, monkeypatch, error):
    def interrupted(self):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            if isinstance(error, RuntimeError):
                raise error from interrupt
            raise

    monkeypatch.setattr(Recorder, "experiment", property(interrupted))
    result = train(**service("Recorder"))
    assert (result.status, result.err) == (130, "")


def test_ctrl_c_while_a_logger_logs_is_130(train, service, monkeypatch):
    """A service's library may wrap it in an error of its own, which would only be said."""

    def interrupted(self, metrics, step=None):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            raise ConnectionError("interrupted") from interrupt

    monkeypatch.setattr(Recorder, "log_metrics", interrupted)
    result = train(**service("Recorder"))
    assert (result.status, result.err) == (130, "")


def test_wandb(train, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    options = {"trainer.logger": "lightning.pytorch.loggers.WandbLogger"}
    options |= {"trainer.logger.save_dir": tmp_path / "wandb"}
    refused = train(**options)
    assert refused.status == 2
    (line,) = (x for x in refused.err.splitlines() if not x.startswith("wandb: "))
    assert line.startswith("error: WandbLogger can't start: ")
    assert "run `wandb login`, or set WANDB_MODE=offline" in line
    assert "Traceback" not in refused.err
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb

    wandb.teardown()  # it keeps the mode that it started in
    ids = []
    for argv in ({}, {"ckpt_path": "last", "trainer.max_steps": 8}, {}):
        result = train(**options, **argv)
        assert result.status == 0, result.err
        ids.append(result.run.trainer.loggers[1].version)
        wandb.finish()
    wandb.teardown()
    assert ids[0] == ids[1] != ids[2]


def test_the_writer_of_metrics_csv_is_lightnings(tmp_path):
    """What AppendedCSV replaces: docs/lightning-notes.md#loggers."""
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": torch.tensor(1.0)}, 1)
    assert logger._experiment is logger.experiment
    assert hasattr(logger.experiment, "_check_log_dir_exists")
