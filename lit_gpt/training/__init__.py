"""Training a model. Importing anything from here imports Lightning, and does so quickly."""

from typing import Any

from lightning_utilities.core.imports import RequirementCache


def _import_torchmetrics() -> None:
    """Imports torchmetrics without transformers and matplotlib, which nothing here uses.

    It imports both wherever they are installed, 1.3 s, and Lightning imports it
    (https://github.com/Lightning-AI/torchmetrics/issues/3457).
    """
    cache: Any = RequirementCache
    found = cache.__bool__
    unused = ("transformers", "matplotlib")
    cache.__bool__ = lambda self: not str(self.requirement).startswith(unused) and found(self)
    try:
        import torchmetrics  # noqa: F401
    finally:
        cache.__bool__ = found


_import_torchmetrics()
