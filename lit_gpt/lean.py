"""Owns a quick start: what torchmetrics would import wherever it is installed, and nobody uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = {"transformers", "matplotlib"}  # a second and half a second


@contextmanager
def without_unused() -> Iterator[None]:
    """Around the first import of Lightning: for its metrics these packages are not installed."""
    from lightning_utilities.core.imports import RequirementCache

    found = RequirementCache.__bool__

    def is_wanted(self: RequirementCache) -> bool:
        return str(self.requirement).partition(">")[0] not in UNUSED and found(self)

    RequirementCache.__bool__ = is_wanted
    try:
        yield
    finally:
        RequirementCache.__bool__ = found
