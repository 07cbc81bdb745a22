"""The progress bar: totals, what it shows, and that printing works with it and without it."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_gpt.callbacks.progress import ProgressBar, Throughput


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True

    def reconfigure(self, **options) -> None:
        """As sys.stdout has it."""


class Watched(pl.Callback):
    """Prints through the module; keeps what the bar shows after each step."""

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        bar = trainer.progress_bar_callback
        bar.last_refresh = 0.0
        self.total = bar.train_progress_bar.total
        self.shown = str(bar.train_progress_bar)
        pl_module.print(f"after step {trainer.global_step}", "of", trainer.max_steps)


def bar_of(fit, screen: StringIO, *callbacks: pl.Callback, ckpt_path=None, **trainer) -> Watched:
    throughput, watched = Throughput(), Watched()
    trainer["enable_progress_bar"] = True
    with redirect_stdout(screen):
        fit([watched, throughput, ProgressBar(throughput), *callbacks], trainer, ckpt_path)
    return watched


def test_the_bar_counts_steps_and_shows_loss_and_speed(fit):
    terminal = Terminal()
    watched = bar_of(fit, terminal, accumulate_grad_batches=2)
    assert watched.total == 6
    assert "5/6 [" in watched.shown or "6/6 [" in watched.shown
    assert "loss=5." in watched.shown
    assert "tokens/s=" in watched.shown
    out = terminal.getvalue()
    assert "Training:" in out
    for step in range(1, 7):
        assert f"after step {step} of 6\n" in out


def test_a_resumed_run_counts_on(fit, tmp_path):
    saves = ModelCheckpoint(tmp_path, "four", every_n_train_steps=4)
    bar_of(fit, Terminal(), saves, max_steps=4)
    watched = bar_of(fit, Terminal(), ckpt_path=tmp_path / "four.ckpt", max_steps=8)
    assert watched.total == 8
    assert " 7/8 [" in watched.shown or " 8/8 [" in watched.shown


def test_without_a_terminal_there_are_only_lines(fit, capsys):
    pipe = StringIO()
    bar_of(fit, pipe)
    assert pipe.getvalue().splitlines() == [f"after step {step} of 6" for step in range(1, 7)]
    assert "Training" not in capsys.readouterr().err


def test_the_command_prints_its_lines_with_the_bar_on(train):
    plain = train().steps
    screen = Terminal()
    with redirect_stdout(screen):
        assert train(**{"trainer.enable_progress_bar": True}).status == 0
    lines = screen.getvalue().replace("\r", "\n").splitlines()
    assert [line.strip() for line in lines if line.startswith("Step: ")] == plain
