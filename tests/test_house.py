"""The rules of the house: what an import does, who imports whom, and how much there is to read."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lit_gpt
from tests.conftest import ROOT

PACKAGE = Path(lit_gpt.__file__).parent
MODULES = [m.name for m in pkgutil.walk_packages([str(PACKAGE)], "lit_gpt.") if "__" not in m.name]


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs code in an empty folder that is its home too."""
    env = {"HOME": str(folder), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def loaded(modules: list[str], candidates: set[str], folder: Path) -> set[str]:
    """Which of the candidates are loaded once these modules have been imported."""
    code = f"import sys, {', '.join(modules)}; print(*({candidates!r} & set(sys.modules)))"
    done = run_python(code, folder)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


IMPORT_EVERYTHING = """
import builtins, importlib, os, random, signal
import lit_gpt.training  # torchmetrics by itself has matplotlib write to the home
import lightning.pytorch, numpy, torch

OPTIONAL = {
    *("matplotlib", "obstore", "openai", "optuna", "plotly", "pyarrow", "pydantic", "rustbpe"),
    *("safetensors", "splintr", "starlette", "tokenizers", "transformers", "uvicorn", "wandb"),
    "zstandard",
}

def state():
    rng = (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist())
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return rng, handlers, torch.get_num_threads(), dict(os.environ), os.getcwd()

def importing(name, globals=None, *args, **kwargs):
    importer = (globals or {}).get("__name__", "")
    if importer.startswith("lit_gpt") and name.split(".")[0] in OPTIONAL:
        # `serve` imports these, after it has checked that the web framework is there.
        serving = ("access", "app", "chat_api", "openai_api", "responses", "streaming")
        allowed = [f"lit_gpt.serving.{module}" for module in serving]
        assert importer in allowed, f"{importer} imports {name}"
    return original(name, globals, *args, **kwargs)

original, builtins.__import__ = builtins.__import__, importing
before = state()
for module in MODULES:
    importlib.import_module(module)
assert state() == before
"""


def test_nothing_happens_on_import(tmp_path):
    """No output, file, signal handler, random number or thread count; no optional package."""
    done = run_python(f"MODULES = {MODULES!r}\n{IMPORT_EVERYTHING}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_the_package_and_its_help_load_next_to_nothing(tmp_path):
    heavy = {"torch", "numpy", "lightning", "rich", "tiktoken"}
    assert loaded(["lit_gpt"], heavy | {"jsonargparse"}, tmp_path) == set()
    assert loaded(["lit_gpt.__main__"], heavy, tmp_path) == set()


def test_training_and_planning_load_nothing_that_they_do_not_use(tmp_path):
    """torchmetrics alone would import the first three; torch._dynamo comes with any optimizer."""
    unused = {"transformers", "matplotlib", "torchvision", "torch._inductor.compile_fx", "triton"}
    unused |= {"pandas", "wandb", "optuna", "onnx", "tensorflow", "IPython", "pyarrow"}
    for module in ("lit_gpt.training.train", "lit_gpt.planning.plan"):
        assert loaded([module], unused, tmp_path) == set()


def test_generating_serving_and_exporting_load_neither_lightning_nor_the_compiler(tmp_path):
    modules = ["lit_gpt.generation.generate", "lit_gpt.generation.interactive"]
    heavy = {"lightning", "torchmetrics", "torch._dynamo", "transformers"}
    assert loaded(modules, heavy | {"rich"}, tmp_path) == set()
    modules = ["lit_gpt.serving.serve", "lit_gpt.huggingface.export"]
    assert loaded(modules, heavy, tmp_path) == set()


@pytest.mark.parametrize(("platform", "tolerance"), [(sys.platform, 0.02), ("another", 1.02)])
def test_the_clock_starts_with_the_process(tmp_path, platform, tolerance):
    """psutil, used on other platforms, takes Linux to have booted at a whole second."""
    code = "import sys, time; time.sleep(1); from lit_gpt import command; sys.platform = {!r}; "
    code += "print(time.monotonic() - {!r} - command.seconds_since_start())"
    done = run_python(code.format(platform, time.monotonic()), tmp_path)
    before = float(done.stdout)  # the time from here to the start of the process
    assert -tolerance <= before < 0.9


def test_the_import_contract_holds(tmp_path):
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_package_shows_its_core_files_and_a_folder_for_each_wing():
    shown = [path for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed")]
    core = (
        "__init__ __main__ checkpoint checkpoint_file command data embeddings errors lora model "
        "module optim optimizer_state output_layer storage windows"
    )
    assert sorted(path.stem for path in shown if path.is_file()) == core.split()
    wings = (
        "budget callbacks distributed evaluation generation huggingface planning reports serving "
        "store text training tuning"
    )
    assert sorted(path.name for path in shown if path.is_dir()) == wings.split()


def test_the_core_is_read_in_an_evening():
    files = "text/tokenizer text/corpus data model optim module checkpoint generation/sampling"
    texts = [
        (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
        for name in [*files.split(), "training/train"]
    ]
    assert sum(len(text.splitlines()) for text in texts) <= 2800
