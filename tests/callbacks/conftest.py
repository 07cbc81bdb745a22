from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests import small_run


@pytest.fixture
def fit(text_file: Path, tmp_path: Path):
    """`fit([callback], {"max_steps": 9}, skip_bad_steps=1)`: the Trainer afterwards."""
    return partial(small_run.fit, text_file, tmp_path)
