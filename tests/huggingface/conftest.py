"""A folder of each kind that transformers made."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.huggingface.folders import KINDS, make_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for kind in KINDS:
        make_folder(root / kind, kind)
    return root


@pytest.fixture(params=KINDS)
def folder(folders, tmp_path, request) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(folders / request.param, tmp_path / request.param))
