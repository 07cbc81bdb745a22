"""Predicting a run before it starts."""

import lit_gpt.training  # noqa: F401  # before Lightning, so that torchmetrics is imported quickly
