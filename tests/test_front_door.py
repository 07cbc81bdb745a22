"""The public names of `import lit_gpt`, `lit_gpt.load`, and the commands' entry point."""

from __future__ import annotations

import gc
import io
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

import lit_gpt
from lit_gpt import __main__ as front_door
from lit_gpt.command import call, command_line
from lit_gpt.text.vocabularies import load_tokenizer
from tests.conftest import ROOT
from tests.generation.models import save_model, small_model


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_it_loads_nothing_heavy():
    code = (
        "import sys; before = set(sys.modules); import lit_gpt; print(*set(sys.modules) - before)"
    )
    loaded = {name.partition(".")[0] for name in run_python(code).split()}
    assert "lit_gpt" in loaded
    assert not loaded & {"torch", "numpy", "lightning", "jsonargparse", "tiktoken", "rich"}


def test_importing_it_takes_less_than_50_ms():
    code = (
        "import time; start = time.process_time(); import lit_gpt\n"
        "print(time.process_time() - start)"
    )
    assert min(float(run_python(code)) for _ in range(3)) < 0.05


def test_all_public_names_are_there():
    for name in lit_gpt.__all__:
        assert getattr(lit_gpt, name).__name__ == name
        assert getattr(lit_gpt, name).__doc__
    assert set(lit_gpt.__all__) <= set(dir(lit_gpt))
    assert lit_gpt.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="module 'lit_gpt' has no attribute 'nothing'"):
        _ = lit_gpt.nothing


def test_loading_a_model_leaves_the_compiler_unloaded():
    """torch._dynamo takes a second to import; computing on the meta device would do so."""
    path = ROOT / "tests" / "data" / "0.1.0" / "adamw"
    code = f"import sys, lit_gpt; print(len(lit_gpt.load({str(path)!r}).generate('a', 5)))\n"
    code += "print('torch._dynamo' in sys.modules, 'lightning' in sys.modules)"
    assert run_python(code).split()[1:] == ["False", "False"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of a run with a best and a last checkpoint, of different models."""
    folder = tmp_path_factory.mktemp("logs") / "version_0"
    for name, style in (("best", "modern"), ("last", "classic")):
        path = folder / "checkpoints" / f"{name}.ckpt"
        save_model(small_model(style=style), load_tokenizer("bytes"), path)
    return folder


def test_load_generates_and_streams_what_the_command_prints(run_folder, capsys):
    model = lit_gpt.load(run_folder)
    text = model.generate("the cat", max_new_tokens=40, temperature=0.9, top_k=20, seed=5)
    argv = ["--max_new_tokens=40", "--temperature=0.9", "--top_k=20", "--seed=5"]
    path = run_folder / "checkpoints" / "best.ckpt"
    assert front_door.main(["generate", f"--ckpt_path={path}", "--prompt=the cat", *argv]) == 0
    assert capsys.readouterr().out == f"the cat{text}\n"
    parts = list(model.stream("the cat", 40, temperature=0.9, top_k=20, seed=5))
    assert "".join(parts) == text
    assert len(parts) > 10
    assert "" not in parts


def test_load_takes_a_file_or_a_folder(run_folder):
    checkpoints = run_folder / "checkpoints"
    best = lit_gpt.load(str(checkpoints / "best.ckpt")).generate("ab", 20)
    last = lit_gpt.load(checkpoints / "last.ckpt").generate("ab", 20)
    assert best != last
    assert lit_gpt.load(run_folder).generate("ab", 20) == best
    assert lit_gpt.load(run_folder.parent).generate("ab", 20) == best
    (checkpoints / "best.ckpt").rename(run_folder / "best.ckpt")
    assert lit_gpt.load(run_folder).generate("ab", 20) == last
    (run_folder / "best.ckpt").rename(checkpoints / "best.ckpt")


def test_stops_end_the_text_before_them(run_folder):
    model = lit_gpt.load(run_folder)
    text = model.generate("ab", 40)
    stop = text[10:12]
    assert model.generate("ab", 40, stop=stop) == text[: text.index(stop)]
    assert model.generate("ab", 40, stop=["never", stop]) == text[: text.index(stop)]


def test_mistakes_from_python_name_the_plain_field(run_folder, tmp_path):
    model = lit_gpt.load(run_folder)
    with pytest.raises(lit_gpt.UserError, match=r"^temperature -1: must be in \[0, 1e6\]$"):
        model.stream(temperature=-1)  # already here, not only when the text is read
    with pytest.raises(lit_gpt.UserError, match=r"^max_new_tokens 0: must be at least 1$"):
        model.generate(max_new_tokens=0)
    with pytest.raises(lit_gpt.UserError, match="no checkpoint below"):
        lit_gpt.load(tmp_path)
    with pytest.raises(lit_gpt.UserError, match="no checkpoint at"):
        lit_gpt.load(tmp_path / "none.ckpt")


# Commands


def test_the_front_door_lists_its_commands(capsys):
    assert front_door.main([]) == 0
    text = capsys.readouterr().out
    for name in front_door.COMMANDS:
        assert f"\n  {name} " in text
    assert front_door.main(["tarin"]) == 2
    names = ", ".join(front_door.COMMANDS)
    assert capsys.readouterr().err == f"error: no command 'tarin'; use one of {names}\n"


@pytest.mark.parametrize("name", sorted(front_door.COMMANDS))
def test_every_command_has_a_script_of_its_name(name):
    assert f'main(["{name}", ' in (ROOT / "scripts" / f"{name}.py").read_text()


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("scripts/train.py", "python scripts/generate.py --prompt 'the cat'"),
        ("/usr/bin/lit-gpt", "lit-gpt generate --prompt 'the cat'"),
        ("/somewhere/lit_gpt/__main__.py", "lit-gpt generate --prompt 'the cat'"),
    ],
)
def test_printed_commands_start_the_way_this_one_was_started(program, expected, monkeypatch):
    monkeypatch.setattr("sys.argv", [program, "train"])
    assert command_line("generate", "--prompt", "the cat") == expected


def example(size: int, *, name: tuple[str, ...] = (), loud: bool = False, share: float = 0.5):
    """Do something.

    Args:
        size: of the thing.
        name: may be repeated.
        loud: say it aloud.
        share: a part of it, at most 100 %.
    """
    return size, name, loud, share


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--size=3"], (3, (), False, 0.5)),
        (
            ["--size", "3", "--name=[a]", "--name", "null", "--loud"],
            (3, ("[a]", "null"), True, 0.5),
        ),
        (["--config=FILE"], (2, ("a", "b"), True, 0.25)),
        (["--config=FILE", "--size=4", "--name=c"], (4, ("a", "b", "c"), True, 0.25)),
    ],
)
def test_options_come_from_the_signature(argv, expected, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("size: 2\nname: [a, b]\nloud: true\nshare: 0.25\n")
    assert call(example, [word.replace("FILE", str(file)) for word in argv]) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--size=x"], "size 'x': must be a whole number; --help lists all options"),
        (["--size=1", "--share=x"], "share 'x': must be a number; --help lists all options"),
        (["--size=1", "--no=2"], "unrecognized arguments: --no=2; --help lists all options"),
        ([], "the following arguments are required: size; --help lists all options"),
    ],
)
def test_wrong_options_are_user_errors(argv, message):
    with pytest.raises(lit_gpt.UserError, match=f"^{message}$"):
        call(example, argv)


def test_help_comes_from_the_docstring(capsys):
    with pytest.raises(SystemExit):
        call(example, ["--help"])
    text = capsys.readouterr().out
    assert "Do something." in text
    assert "--size INT" in text
    assert "of the thing (required)" in text
    assert "a part of it, at most 100 % (default: 0.5)" in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def importing(monkeypatch):
    """Runs a command of the front door with a module that a function makes when it is imported."""

    def run(name: str, make: Callable[[], object], main: Callable = lambda argv: 0) -> int:
        monkeypatch.setattr(front_door, "import_module", lambda path: make() or module)
        module = SimpleNamespace(main=main)
        return front_door.main([name])

    yield run
    gc.unfreeze()


NOTICE = "Starting: loading PyTorch ..."


@pytest.mark.parametrize("name", sorted(front_door.COMMANDS.keys() - {"prepare", "report"}))
def test_a_notice_is_on_the_terminal_until_the_imports_are_done(importing, monkeypatch, name):
    monkeypatch.setattr("sys.stderr", Terminal())
    seen = []

    def look(*_) -> None:
        seen.append(sys.stderr.getvalue())

    assert importing(name, look, look) == 0
    wiped = f"{NOTICE}\r{' ' * len(NOTICE)}\r"
    assert seen == [wiped + NOTICE, 2 * wiped]  # first lit_gpt.command, then the command's module


@pytest.mark.parametrize("case", ["pipe", "another rank", "prepare", "report", "closed"])
def test_no_notice_where_it_would_stay_or_is_not_needed(importing, monkeypatch, case):
    stream = io.StringIO() if case == "pipe" else Terminal()
    monkeypatch.setattr("sys.stderr", None if case == "closed" else stream)
    monkeypatch.setenv("LOCAL_RANK", "1" if case == "another rank" else "0")
    assert importing(case if case in front_door.COMMANDS else "train", lambda: None) == 0
    assert stream.getvalue() == ""


def test_the_notice_comes_before_any_import_that_takes_long():
    code = (
        "import sys, types\n"
        "from lit_gpt.__main__ import main\n"
        "class Terminal:\n"
        "    isatty = lambda self: True\n"
        "    flush = lambda self: None\n"
        "    write = lambda self, text: print(text.strip(), *{'jsonargparse'} & set(sys.modules))\n"
        "sys.modules['lit_gpt.training.train'] = types.SimpleNamespace(main=lambda argv: 0)\n"
        "sys.stderr = Terminal()\n"
        "main(['train'])"
    )
    assert run_python(code).splitlines()[0] == NOTICE


def test_imports_collect_no_garbage_and_their_objects_are_left_alone(importing, monkeypatch):
    seen = []

    def load() -> None:
        seen.append(gc.isenabled())
        monkeypatch.setitem(sys.modules, "one_more", SimpleNamespace())

    def start(argv: list[str]) -> int:
        seen.append(gc.isenabled())
        seen.append(gc.get_freeze_count())
        return 0

    gc.unfreeze()
    assert importing("train", lambda: seen.append(gc.isenabled()), start) == 0
    assert seen == [False, True, 0]  # nothing was imported that was not there
    seen.clear()
    assert importing("train", load, start) == 0
    assert seen[:2] == [False, True]
    assert seen[2] > 1000


@pytest.mark.skipif(sys.platform != "linux", reason="segments expand on Linux only")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, "max_split_size_mb:512"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, "max_split_size_mb:128"),
        ({"PYTORCH_ALLOC_CONF": ""}, ""),
    ],
    ids=str,
)
def test_the_allocator_is_configured_before_torch_is_imported(given, expected):
    """What PyTorch itself has read, asked at the moment when a command would begin."""
    code = (
        "import sys, types\n"
        "def main(argv):\n"
        "    import torch\n"
        "    print(f'[{torch._C._accelerator_getAllocatorSettings()}]')\n"
        "sys.modules['lit_gpt.training.train'] = types.SimpleNamespace(main=main)\n"
        "from lit_gpt.__main__ import main\n"
        "assert 'torch' not in sys.modules\n"
        "main(['train'])"
    )
    env = {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k} | given
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert out.stdout == f"[{expected}]\n", out.stderr
