"""Warnings that would tell a user nothing."""

from __future__ import annotations

import logging
import warnings


def silence_warnings() -> None:
    """Silences what would tell a user nothing: Lightning's notes, and warnings by their text."""
    for name in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    for message in (
        "LightningCLI's args parameter",  # the entry point passes them on
        ".*LeafSpec.*",  # torch 2.13 and Lightning's use of its pytrees
        "Checkpoint directory .* exists and is not empty",  # at each resumed run
        ".*`weights_only` was not set.*",  # on saving, where it means nothing
        "It is recommended to use .*sync_dist",  # torchmetrics has synchronized already
        "You defined a `validation_step` but have no",  # --find_lr evaluates nothing
        "Mismatch dtype between input and weight",  # RMSNorm in bf16-mixed: only slower
        "The dirpath has changed from",  # a new run from another run's checkpoint
        ".*AMP with fp16 is not supported on CPU",  # the line of the device says it,
        ".*is supported for historical reasons",  # and what 16 and bf16 mean
        "Be aware that when using `ckpt_path`",  # of callbacks that were left out on purpose
    ):
        warnings.filterwarnings("ignore", message)
