"""The docs are true: links resolve, commands and options exist, pages and tables are complete."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import yaml

from benchmarks.run import KINDS
from benchmarks.run import main as measure
from lit_gpt.__main__ import COMMANDS, main
from lit_gpt.checkpoint import read_checkpoint
from lit_gpt.planning.plan import CLUSTER_OPTIONS
from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
FRONT = [ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md")]
TEXTS = {path: path.read_text(encoding="utf-8") for path in [*PAGES, *FRONT]}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OTHERS = {  # commands of other packages
    *(".", "curl", "jupyter", "lint-imports", "mkdocs", "mypy", "pip", "pytest", "python", "ruff"),
    *("tensorboard", "unzip"),
}
LINKED = {"data.seed", "model.seed", "model.context_length", "model.vocab_size"}  # no options
COMPUTED = ("the ", "as many", "d_model", "4 d_model")  # defaults that depend on something else

each_text = pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)


def slug(heading: str) -> str:
    """The anchor that MkDocs and GitHub give a heading."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.strip("# ")).lower())


def anchors(path: Path) -> set[str]:
    prose = FENCED.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ .+", prose, re.MULTILINE)
    assert not [heading for heading in headings if "{#" in heading], "GitHub shows it"
    named = re.findall(r'^<a id="([\w-]+)"></a>$', prose, re.MULTILINE)
    return {*named, *(slug(heading) for heading in headings)}


@each_text
def test_links_and_their_anchors_resolve(path):
    for target in re.findall(r"\]\(((?!\w+:)[^)]+)\)", FENCED.sub("", TEXTS[path])):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@each_text
def test_the_files_that_it_names_exist(path):
    folders = "benchmarks|configs|data|docs|lit_gpt|notebooks|scripts|tests"
    names = re.findall(rf"(?<![\w/])(?:{folders})/[\w/.-]*\w/?", TEXTS[path])
    there = (ROOT, ROOT / "docs")
    made = re.compile(r"data/shakespeare_char/.*|logs/.*")  # not ours
    named = {name for name in names if not made.fullmatch(name)}
    assert {
        name for name in named if not any((folder / name).exists() for folder in there)
    } == set()


def test_comments_refer_to_anchors_that_exist():
    for file in (
        path for top in ("lit_gpt", "tests", "benchmarks") for path in (ROOT / top).rglob("*.py")
    ):
        for name, anchor in re.findall(r"docs/([\w-]+\.md)#([\w-]+)", file.read_text("utf-8")):
            assert anchor in anchors(ROOT / "docs" / name), f"{file}: {name}#{anchor}"


def test_every_page_is_in_the_navigation():
    text = re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(re.findall(r"[\w-]+\.md", json.dumps(yaml.safe_load(text)["nav"])))
    assert listed == {path.name for path in PAGES}


def test_the_site_loads_nothing_from_elsewhere():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert config["theme"]["font"] is False
    assert not {"extra_css", "extra_javascript", "repo_url", "site_url"} & set(config)


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= (
            flatten(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return flat


@pytest.fixture
def ask(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """What a command prints and then exits, such as its help."""

    def run(command: Callable[[list[str]], int], *argv: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            command(list(argv))
        return capsys.readouterr().out

    return run


@pytest.fixture
def names(ask) -> Callable[..., set[str]]:
    """`names(main, "generate")`: a command's options, by their full names."""
    return cache(
        lambda command, *argv: set(re.findall(r"--([\w.]+)", ask(command, *argv, "--help")))
    )


@pytest.fixture
def defaults(ask) -> Callable[[str], dict[str, object]]:
    """`defaults("train")`: the command's options, by their full names, and their defaults."""
    return cache(lambda command: flatten(yaml.safe_load(ask(main, command, "--print_config"))))


def commands_in(text: str) -> list[list[str]]:
    """What its bash blocks run, as lists of words."""
    blocks = [code for language, code in FENCED.findall(text) if language == "bash"]
    lines = [line for code in blocks for line in code.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in line.split("&&")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def test_commands_and_their_options_exist(names, defaults):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for words in [words for text in TEXTS.values() for words in commands_in(text)]:
        if words[0] == "torchrun":
            words = ["lit-gpt", *words[words.index("lit_gpt") + 1 :]]
        match words:
            case ["lit-gpt", command, *rest]:
                pass
            case ["sbatch", script, *rest]:
                assert (ROOT / script).is_file(), words
                command = "train"
            case ["python", script, *rest] if script.startswith("scripts/"):
                command = Path(script).stem
            case ["python", "benchmarks/run.py", kind, *rest]:
                assert kind in KINDS, words
                assert options_in(rest) <= names(measure, kind), words
                continue
            case ["python", "-m", "venv", *_]:
                continue
            case ["python", script, *_]:
                assert (ROOT / script).is_file(), words
                continue
            case ["pip", "install", "-e", target]:
                extras = re.findall(r"\w+", target)
                assert all(re.search(rf"^{extra} = \[", project, re.M) for extra in extras), words
                continue
            case ["pytest", "-m", marker]:
                assert f'"{marker}: ' in project, words
                continue
            case [program, *_]:
                assert program in OTHERS, words
                continue
        assert command in COMMANDS, words
        is_long = command in ("train", "plan")  # whose --help is not complete
        known = set(defaults("train")) if is_long else names(main, command)
        known |= set(section_of("plan")) if command == "plan" else set()
        assert options_in(rest) <= {*known, "config", "help"}, words


def options_in(words: list[str]) -> set[str]:
    return {word[2:].partition("=")[0] for word in words if word.startswith("--")}


def option_rows(text: str) -> dict[str, str]:
    """Names and written defaults of the tables of options."""
    rows = re.findall(r"^\| `--([\w.]+)` \| ([^|]+) \|", text, re.MULTILINE)
    return {name: value.strip("` ") for name, value in rows}


def same(written: str, default: object) -> bool:
    if written in ("none", "required"):
        return default in (None, [])
    if default is None:
        return written.startswith(COMPUTED)
    return written == str(default) or yaml.safe_load(written) == default


def section_of(command: str) -> dict[str, str]:
    page = TEXTS[ROOT / "docs" / "options.md"]
    return option_rows(re.search(rf"(?ms)^## {command}\b.*?(?=^## |\Z)", page)[0])


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("plan", "sweep")])
def test_the_page_of_options_is_what_the_command_takes(command, defaults):
    listed, options = section_of(command), defaults(command)
    wanted = {name for name in options if name not in ("runs", "folders")}
    if command == "train":
        wanted = {name for name in wanted if not name.startswith("trainer.")} - LINKED
        wanted |= {name for name in listed if name.startswith("trainer.")}
    assert set(listed) == wanted
    for name, value in listed.items():
        if name != "data.path":  # wherever the sample corpus is installed
            assert same(value, options[name]), f"--{name}: {value} is not {options[name]!r}"


def test_the_page_of_options_has_those_of_the_sweep(names):
    assert set(section_of("sweep")) == names(main, "sweep") - {"help", "trainer.max_steps"}


def test_the_page_of_options_has_those_of_the_plan():
    assert section_of("plan") == {**dict.fromkeys(CLUSTER_OPTIONS, "none"), "json": "false"}


def test_the_page_of_architecture_lists_what_a_checkpoint_contains():
    text = TEXTS[ROOT / "docs" / "architecture.md"].partition("## What a checkpoint contains")[2]
    rows = re.findall(r"^\| (`.+?) \|", text.partition("\n## ")[0], re.MULTILINE)
    listed = {name for row in rows for name in re.findall("`([^`]+)`", row)}
    path = ROOT / "tests" / "data" / "0.1.0" / "adamw" / "checkpoints" / "last.ckpt"
    lacks = {"options", "TextDataModule", "lora"}  # 0.1.0
    assert listed == {*read_checkpoint(path), *lacks}


def test_the_private_parts_of_lightning_are_where_the_page_says():
    text = TEXTS[ROOT / "docs" / "lightning-notes.md"]
    rows = re.findall(r"^\| (`_.+?) \| `(lit_gpt/[\w/]+\.py)`", text, re.MULTILINE)
    assert len(rows) >= 3
    for names, file in rows:
        code = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall("`([^`]+)`", names):
            assert name in code, f"{name} is not in {file}"


@each_text
def test_python_blocks_are_python(path):
    for language, code in FENCED.findall(TEXTS[path]):
        if language == "python":
            ast.parse(code)


@pytest.mark.parametrize("name", ["README.md", "docs/python-api.md"])
def test_its_python_trains_and_generates(name, text_file, tmp_path, monkeypatch, capsys):
    """All blocks of the page, the training first; with fewer steps and a smaller model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("my.txt").write_text(text_file.read_text(encoding="utf-8"), encoding="utf-8")
    codes = [code for language, code in FENCED.findall(TEXTS[ROOT / name]) if language == "python"]
    codes.sort(key=lambda code: "trainer.fit" not in code)
    assert "trainer.fit" in codes[0]
    for old, new in {
        "d_model=64": "d_model=16",
        "steps=200": "steps=4",
        "interval=50": "interval=2",
    }.items():
        assert old in codes[0]
        codes[0] = codes[0].replace(old, new)
    for code in codes:
        exec(code.replace("logs/version_0", "my.ckpt"), {})
    assert "Once upon" not in capsys.readouterr().err
    assert Path("my.ckpt").is_file()
