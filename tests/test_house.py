"""The house rules of lit_gpt, read from its source: who imports whom, sizes, nothing on import."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lit_gpt

FOLDER = Path(lit_gpt.__file__).parent
FILES = sorted(FOLDER.glob("*.py"))
MODULES = {path.stem: path for path in FILES if path.stem != "__init__"}

# What each module may import of the package: only modules further up in this table.
MAY_IMPORT = {
    "errors": set(),
    "lean": set(),
    "atomic": set(),
    "options": {"errors"},
    "history": {"errors", "atomic"},
    "charts": {"history"},
    "page": set(),
    "report": {"errors", "atomic", "history", "charts", "page"},
    "optim": set(),
    "plot": {"atomic"},
    "scrutiny": set(),
    "stability": {"errors"},
    "tokenizer": {"errors"},
    "hf_tokenizer": {"errors", "tokenizer"},
    "cache": {"errors"},
    "bpe": {"errors", "tokenizer"},
    "formats": {"errors"},
    "files": {"errors", "formats"},
    "corpus": {"errors", "tokenizer", "cache", "bpe", "files"},
    "model": {"errors"},
    "layouts": {"errors", "model"},
    "hf_config": {"errors", "layouts", "model"},
    "stopping": {"errors"},
    "cluster": set(),
    "sampling": {"errors", "tokenizer", "model"},
    "completion": {"errors", "model", "sampling", "tokenizer"},
    "checkpoint": {"errors", "atomic", "tokenizer", "model"},
    "pretrained": {
        *("errors", "tokenizer", "hf_tokenizer", "model", "layouts", "checkpoint", "hf_config"),
    },
    "runs": {"errors", "atomic"},
    "data": {"errors", "tokenizer", "bpe", "files", "corpus", "pretrained"},
    "module": {"errors", "optim", "stability", "model", "pretrained"},
    "saving": {"errors", "atomic", "checkpoint", "module", "stopping"},
    "resuming": {"errors", "model", "checkpoint", "pretrained", "data", "module"},
    "recorder": {"checkpoint"},
    "killed_run": {"checkpoint", "recorder"},
    "verification": {"errors", "recorder", "killed_run"},
    "trace": {"tokenizer", "completion"},
    "writing": {*("errors", "tokenizer", "model", "sampling", "completion", "checkpoint", "trace")},
    "interactive": {
        *("errors", "tokenizer", "model", "sampling", "completion", "checkpoint", "writing")
    },
    "batching": {"model", "tokenizer", "completion"},
    "protocol": {"errors", "sampling", "completion"},
    "serve_page": {"page", "sampling", "completion"},
    "web": {"completion", "batching", "protocol"},
    "serve": {"errors", "checkpoint", "batching", "serve_page", "web"},
    "export_check": {
        *("errors", "tokenizer", "corpus", "files", "model", "sampling", "hf_tokenizer", "layouts"),
    },
    "model_card": {
        *("errors", "history", "tokenizer", "model", "layouts", "hf_tokenizer", "export_check"),
    },
    "export": {
        *("errors", "atomic", "tokenizer", "corpus", "sampling", "checkpoint", "layouts"),
        *("hf_config", "hf_tokenizer", "export_check", "model_card", "model"),
    },
    "callbacks": {"data", "sampling", "stopping"},
    "console": {"scrutiny", "data", "module", "stopping", "saving", "callbacks"},
    "reporting": {"errors", "atomic", "history", "report", "callbacks"},
    "find_lr": {"errors", "plot", "stability", "module", "console"},
    "cli": {
        *("errors", "options", "runs", "data", "module", "checkpoint", "stopping", "cluster"),
        *("saving", "resuming", "callbacks", "console", "find_lr", "reporting"),
    },
    "sweep_space": {"errors"},
    "sweep_report": {"plot", "sweep_space"},
    "sweep_trial": {"errors", "callbacks", "cli"},
    "sweep": {"errors", "sweep_space", "sweep_report", "sweep_trial"},
    "trial": {"errors", "callbacks", "saving", "stopping"},
    "suggestions": {"model"},
    "plan": {
        *("errors", "tokenizer", "bpe", "scrutiny", "data", "runs", "saving", "callbacks"),
        *("console", "cli", "trial", "suggestions"),
    },
    "benchmark": {"errors"},
    "benchmark_model": {"errors", "model", "optim", "sampling", "module", "benchmark"},
    "benchmark_plan": {"errors", "benchmark"},
    "benchmark_training": {"optim", "module", "cli", "benchmark"},
}
WITH_LIGHTNING = {
    *("options", "runs", "data", "module", "stopping", "cluster", "saving", "callbacks"),
    *("console", "reporting", "find_lr", "cli", "sweep_trial", "recorder", "benchmark_training"),
    *("trial", "plan"),
}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(tree: ast.Module) -> set[str]:
    """Full names of all imports, inside functions too; `from a import b` is both a and a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports_of(tree: ast.Module) -> set[str]:
    parts = [name.split(".") for name in imports_of(tree)]
    return {part[1] for part in parts if part[0] == "lit_gpt" and len(part) > 1}


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess:
    paths = {"HOME": str(folder), "PYTHONPATH": str(FOLDER.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    paths["MPLCONFIGDIR"] = str(folder.parent)  # torchmetrics imports matplotlib where it finds it
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **paths},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from lit_gpt.model import GPT", {"model"}),
        ("from lit_gpt import callbacks, data", {"callbacks", "data"}),
        ("import lit_gpt.cli as c", {"cli"}),
        ("def f():\n    from lit_gpt.module import LitGPT", {"module"}),
        ("import torch, os.path", set()),
    ],
)
def test_all_forms_of_import_are_found(source, expected):
    found = own_imports_of(ast.parse(source))
    assert {name for name in found if name in MAY_IMPORT} == expected


def test_the_table_has_every_module_and_points_upwards():
    assert set(MAY_IMPORT) == set(MODULES)
    names = list(MAY_IMPORT)
    for i, name in enumerate(names):
        assert MAY_IMPORT[name] <= set(names[:i]), name


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    imported = own_imports_of(tree_of(MODULES[name])) & set(MODULES)
    assert imported <= MAY_IMPORT.get(name, set())


@pytest.mark.parametrize("name", MODULES)
def test_only_training_imports_lightning(name):
    packages = {imported.split(".")[0] for imported in imports_of(tree_of(MODULES[name]))}
    assert ("lightning" in packages) == (name in WITH_LIGHTNING)
    assert not packages & {"scripts", "tests"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_has_at_most_320_lines_and_a_function_40(path):
    tree = tree_of(path)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {f.name for f in functions if f.end_lineno - f.lineno + 1 > 40} == set()
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 320


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_begins_by_saying_what_it_owns(path):
    docstring = ast.get_docstring(tree_of(path)) or ""
    first = docstring.partition("\n")[0]
    assert first.endswith((".", ","))
    if path.name != "__init__.py":
        assert first.startswith("Owns ")


def test_generating_does_not_wait_for_lightning(tmp_path):
    code = (
        "import sys, lit_gpt, lit_gpt.writing, lit_gpt.interactive\n"
        "print(sorted({'lightning', 'torchmetrics', 'rich', 'transformers'} & set(sys.modules)))"
    )
    assert run_python(code, tmp_path).stdout == "[]\n"


def test_options_of_the_scripts_do_not_wait_for_torch(tmp_path):
    code = "import sys, lit_gpt.errors, lit_gpt.killed_run; print('torch' in sys.modules)"
    assert run_python(code, tmp_path).stdout == "False\n"


@pytest.mark.parametrize("package", ["transformers", "matplotlib"])
def test_training_does_not_wait_for_packages_that_only_torchmetrics_wants(package, tmp_path):
    """One stands in for each that says when it is imported; it is to be seen without `lean`."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("print('imported')\nraise SystemExit(3)")
    plain = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    lean = "from lit_gpt import lean\nwith lean.without_unused():\n    import lit_gpt.cli\n"
    lean += (
        "from torchmetrics.utilities.imports import _TQDM_AVAILABLE as other; print(bool(other))"
    )
    result = run_python(plain + lean, tmp_path)
    assert (result.stdout, result.stderr, result.returncode) == ("True\n", "", 0)
    result = run_python(plain + "import lit_gpt.cli", tmp_path)
    assert (result.stdout, result.returncode) == ("imported\n", 3)


def test_nothing_happens_on_import(tmp_path):
    """No output, no file, no signal handler, no random number drawn, no vocabulary read."""
    imports = ", ".join(f"lit_gpt.{name}" for name in MODULES)
    code = (
        "import sys, signal, random, warnings, torch, numpy, lightning.pytorch, rich.console\n"
        "def state():\n"
        "    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]\n"
        "    rng = (random.getstate(), str(numpy.random.get_state()), torch.initial_seed())\n"
        "    return handlers, rng, torch.get_rng_state().tolist(), torch.get_num_threads()\n"
        "optional = {'splintr', 'rustbpe', 'pyarrow', 'transformers', 'safetensors'}\n"
        "optional -= set(sys.modules)  # torchmetrics imports transformers where it finds it\n"
        f"before = state()\nimport {imports}\n"
        "assert state() == before\n"
        "assert not optional & set(sys.modules)"
    )
    result = run_python(code, tmp_path)
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)
    assert list(tmp_path.iterdir()) == []
