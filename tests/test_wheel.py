"""What `pip install` gives a user: the wheel, used in an environment and a folder of its own."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, SMALL

CACHES = {"__pycache__", ".mypy_cache", ".ruff_cache"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that leftovers of earlier builds can't get into it."""
    source = tmp_path_factory.mktemp("source")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("lit_gpt", "data", "tests", "benchmarks", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*CACHES))
    command = ["pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    own = {name for name in names if not name.startswith(f"lit_gpt-{wheel.name.split('-')[1]}.")}
    files = (path.relative_to(ROOT) for path in (ROOT / "lit_gpt").rglob("*") if path.is_file())
    assert own == {path.as_posix() for path in files if not CACHES.intersection(path.parts)}
    assert any(name.endswith("/share/lit_gpt/订单商品名称.csv") for name in names)
    assert "lit_gpt/py.typed" in own


def test_an_installed_wheel_trains_and_generates_in_an_empty_folder(wheel, tmp_path):
    venv.create(tmp_path / "venv", symlinks=os.name != "nt", with_pip=False)
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = next((tmp_path / "venv" / scripts).glob("python*"))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    subprocess.run([*install, "--no-index", str(wheel)], check=True, capture_output=True)
    # The dependencies are those of this environment, but nothing may come from this checkout.
    packages = next((tmp_path / "venv").rglob("site-packages"))
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))

    def run(*command: str) -> str:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
        env.pop("PYTHONPATH", None)
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    folder = tmp_path / "empty"
    folder.mkdir()
    where = run(str(python), "-c", "import lit_gpt; print(lit_gpt.__file__)")
    assert Path(where.strip()).parent == packages / "lit_gpt"
    lit_gpt = str(next((tmp_path / "venv" / scripts).glob("lit-gpt*")))
    options = SMALL | {"trainer.max_steps": 2}
    out = run(lit_gpt, "train", *(f"--{name}={value}" for name, value in options.items()))
    assert "Step: 2, Training Loss: " in out
    written = run(lit_gpt, "generate", "--prompt=康师傅", "--max_new_tokens=5", "--seed=1")
    assert written.startswith("康师傅")
