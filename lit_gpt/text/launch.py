"""Several processes train together: on each machine the first one reads the text for all.

So no two of them can see two versions of a text that is being changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from lit_gpt import storage
from lit_gpt.text.manifest import FOLDER, Known

VARIABLE = "LIT_GPT_TEXTS"  # what a process tells those that Lightning starts from it
MAX_TOLD = 16  # texts in it
READ: set[str] = set()  # settings of the texts that this process has read
OLD = 86_400.0  # seconds: after a day, no process of a launch still starts


class Texts:
    """What the first process of a launch found, by the settings of the text."""

    def find(self, settings: str) -> tuple[str, Known] | None:
        """The name in the cache, and what is known of the text.

        Only for the first time: whoever reads a text again wants it as it is by then.
        """
        if settings in READ:
            return None
        READ.add(settings)
        with suppress(OSError, ValueError, LookupError, TypeError):
            name, known = self._load()[settings]
            return name, Known(*known)
        return None

    def tell(self, settings: str, name: str, known: Known) -> None:
        """Tells the others."""
        told: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            told = self._load()
        told[settings] = (name, known)
        with suppress(OSError):
            self._save(dict(list(told.items())[-MAX_TOLD:]))

    def _load(self) -> dict[str, Any]:
        return {}

    def _save(self, told: dict[str, Any]) -> None:
        pass


class _Inherited(Texts):
    """Through the environment: Lightning's launcher starts the others after the text was read."""

    def find(self, settings: str) -> tuple[str, Known] | None:
        found = super().find(settings)
        return found if "LOCAL_RANK" in os.environ else None

    def _load(self) -> dict[str, Any]:
        return json.loads(os.environ.get(VARIABLE, "{}"))

    def _save(self, told: dict[str, Any]) -> None:
        if "LOCAL_RANK" not in os.environ:
            os.environ[VARIABLE] = json.dumps(told)


class _Shared(Texts):
    """Through a file: torchrun and srun start all at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _load(self) -> dict[str, Any]:
        return storage.read_json(self.path)

    def _save(self, told: dict[str, Any]) -> None:
        storage.write_json(self.path, told)
        for path in self.path.parent.glob("launch-*"):
            if path.stat().st_mtime < time.time() - OLD:
                path.unlink(missing_ok=True)


def _launch() -> str | None:
    """Names the processes that torchrun or srun started together; None: it was neither.

    SLURM sets its variables for each command of a batch script too, and those may read a text
    that changed in between; only what srun starts is a child of its daemon.
    """
    with suppress(psutil.Error):
        parent = psutil.Process(os.getppid())
        if "TORCHELASTIC_RUN_ID" in os.environ or parent.name() == "slurmstepd":
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
            words = (socket.gethostname(), parent.pid, parent.create_time(), attempt)
            return hashlib.sha256(repr(words).encode()).hexdigest()[:24]
    return None


@contextmanager
def texts_of_launch(cache: Path) -> Iterator[Texts]:
    """What other processes of this launch found; those that come later wait for this one.

    Nobody waits for a certain process: whoever comes first does the work, and if it dies, the lock
    goes with it, and the next one does.
    """
    launch = _launch()
    if launch is None:
        yield _Inherited()
        return
    path = cache / FOLDER / f"launch-{launch}.json"
    with storage.held(path.with_suffix(".lock")):
        yield _Shared(path)
