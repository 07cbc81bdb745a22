"""Training a model. Importing anything from here imports Lightning, and does so quickly."""

from lightning_utilities.core.imports import RequirementCache


def _import_torchmetrics() -> None:
    """Imports torchmetrics without transformers and matplotlib, which nothing here uses.

    It imports both wherever they are installed, 1.3 s, and Lightning imports it
    (https://github.com/Lightning-AI/torchmetrics/issues/2242).
    """
    found = RequirementCache.__bool__
    unused = ("transformers", "matplotlib")
    RequirementCache.__bool__ = lambda self: not self.requirement.startswith(unused) and found(self)
    try:
        import torchmetrics  # noqa: F401
    finally:
        RequirementCache.__bool__ = found


_import_torchmetrics()
