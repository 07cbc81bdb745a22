"""Callbacks around the training steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback


def defaults(progress_bar: bool = True) -> list[Callback]:
    """The callbacks to give a plain `pl.Trainer`, as the training command has them too.

    A non-finite loss or gradient stops the run, tokens/s are logged, and the losses of each
    evaluation are printed.

    Args:
        progress_bar: False for a Trainer with enable_progress_bar=False.
    """
    from lit_gpt.callbacks.evaluation import EvaluationPrinter
    from lit_gpt.callbacks.nonfinite import NonFiniteGuard
    from lit_gpt.callbacks.progress import ProgressBar, Throughput

    throughput = Throughput()
    callbacks: list[Callback] = [NonFiniteGuard(), throughput, EvaluationPrinter()]
    return [*callbacks, ProgressBar(throughput)] if progress_bar else callbacks
