"""The README and its Chinese twin: in step, and true of the files and options that they name."""

from __future__ import annotations

import json
import re
from collections import Counter
from difflib import SequenceMatcher
from itertools import chain
from typing import NamedTuple

import pytest
import yaml

from tests.conftest import ROOT

NAMES = ("README.md", "README.zh-CN.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
ENGLISH, CHINESE = TEXTS.values()
LINKS = {"README.md": "[中文](README.zh-CN.md)", "README.zh-CN.md": "[English](README.md)"}

ITEM = r"\ *(?:[-*]|\d+\.)\ "
BLOCK = re.compile(
    rf"""^(?:
    (?P<code>```[^\n]*\n.*?^```$)
    | (?P<heading>\#+\ [^\n]+)
    | (?P<row>\|[^\n]+)
    | (?P<item>{ITEM}[^\n]+(?:\n(?!```|\||{ITEM})[^\n]+)*)
    | (?P<paragraph>[^\n]+(?:\n(?!```|\#+\ |\||{ITEM})[^\n]+)*)
    )""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
CODE, TARGET = re.compile("`[^`]+`"), re.compile(r"\]\([^)]*\)")
FIGURE = re.compile(r"[0-9]+(?:[.,][0-9]+)*(?:\s?%)?")  # number words are left to the translator
HAN = "\u4e00-\u9fff"
STIFF = {  # in prose of the twin, with an x for code
    "no space between Chinese and Latin": f"[{HAN}][A-Za-z0-9]|[A-Za-z0-9%][{HAN}]",
    "half-width punctuation": f"[{HAN}] ?[,.;:?!()]|[,;:?!()] ?[{HAN}]",
    "not translated": rf"\A(?=(?:.*?[a-z]{{2,}}\b){{3}})[^{HAN}]+\Z",
}


class Block(NamedTuple):
    """A heading, row of a table, list item, paragraph or fenced code."""

    section: str  # its heading
    line: int  # from 1
    kind: str
    parts: tuple[str, ...]  # the cells of a row; else all of it

    @property
    def key(self) -> tuple[str, ...]:
        """What a translation keeps: code as it is; else the kind and, in any order, the facts."""
        if self.kind == "code":
            return self.parts
        return (self.kind, *(" ".join(sorted(facts)) for facts in self.facts))

    @property
    def facts(self) -> list[list[str]]:
        if self.kind == "code":
            return [self.parts[0].splitlines()]
        return [facts_of(part) for part in self.parts]


def facts_of(text: str) -> list[str]:
    """Inline code, targets of links and images, and figures."""
    code, rest = CODE.findall(text), CODE.sub("x", text)
    targets, rest = TARGET.findall(rest), TARGET.sub("", rest)
    figures = [re.sub(r"\s", "", figure) for figure in FIGURE.findall(rest)]
    return [*(" ".join(span.split()) for span in code), *targets, *figures]


def blocks_of(markdown: str) -> list[Block]:
    for link in LINKS.values():
        markdown = markdown.replace(link, "[ ]()")
    blocks: list[Block] = []
    section = ""
    for match in BLOCK.finditer(markdown):
        kind, text = match.lastgroup or "", match[0]
        parts: tuple[str, ...] = (text,)
        if kind == "heading":
            section = text.lstrip("# ")
            kind += text.split()[0]
        elif kind == "row":
            parts = tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", text)[1:-1])
            kind = f"{'row' if set(text) - set('|-: ') else 'rule'} of {len(parts)}"
        blocks.append(Block(section, markdown[: match.start()].count("\n") + 1, kind, parts))
    return blocks


def differences(english: str, chinese: str) -> list[str]:
    """What to mend in the twin, with section and lines; nothing if the two are in step."""
    left, right = blocks_of(english), blocks_of(chinese)
    keys = [[block.key for block in blocks] for blocks in (left, right)]
    found = []
    for tag, a, b, c, d in SequenceMatcher(None, *keys, autojunk=False).get_opcodes():
        if [block.kind for block in left[a:b]] == [block.kind for block in right[c:d]]:
            pairs = zip(left[a:b], right[c:d], strict=True)
            found += [mismatch(*pair) for pair in pairs if tag != "equal"]
        else:
            found += [f"{place(0, block)} has nothing like it in the twin" for block in left[a:b]]
            found += [f"{place(1, block)} is in the twin alone" for block in right[c:d]]
    return found


def mismatch(left: Block, right: Block) -> str:
    facts = [Counter(chain(*block.facts)) for block in (left, right)]
    only = [", ".join((facts[i] - facts[1 - i]).elements()) or "nothing" for i in (0, 1)]
    where = f"{place(0, left)}, {place(1, right)}"
    if facts[0] == facts[1]:
        return f"{where}: the same in another order"
    return f"{where}: only in the first {only[0]}; only in the second {only[1]}"


def place(i: int, block: Block) -> str:
    text = " ".join(" | ".join(block.parts)[:40].split())
    return f"{NAMES[i]}:{block.line} [{block.section}] {block.kind} {text!r}"


def stiffness(chinese: str) -> list[str]:
    """Places of the twin that break its typographic rules or are still English."""
    found = []
    for block in blocks_of(chinese):
        for part in block.parts if block.kind != "code" else ():
            prose = TARGET.sub("", CODE.sub("x", part))
            for what, pattern in STIFF.items():
                if match := re.search(pattern, prose, re.DOTALL):
                    found.append(f"{what}: {match[0][:20]!r} in {place(1, block)}")
    return found


def test_the_two_are_in_step():
    assert differences(ENGLISH, CHINESE) == []


def test_the_twin_is_chinese_and_set_as_chinese():
    assert stiffness(CHINESE) == []


@pytest.mark.parametrize("name", NAMES)
def test_each_links_to_the_other_under_its_title(name):
    assert TEXTS[name].splitlines()[:3] == ["# lit_gpt", "", LINKS[name]]


def test_it_is_short():
    assert len(ENGLISH.splitlines()) <= 210


def options_table(text: str) -> list[tuple[str, str]]:
    """Name and default of each option in the table of train.py's options."""
    table = re.search(r"^\| (?:Option|选项) \|.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    pairs = []
    for row in table[1].splitlines()[1:]:
        names, values = (re.split(", |、", cell.strip()) for cell in row.split("|")[1:3])
        group = names[0].strip("`-").partition(".")[0]
        names = [re.sub(r"^\.", f"{group}.", name.strip("`-")) for name in names]
        pairs += zip(names, [value.strip("`") for value in values], strict=True)
    return pairs


def look_up(config: dict, name: str):
    for part in name.split("."):
        config = config[part]
    return config


def test_options_and_defaults_are_those_of_train_py(train):
    config = yaml.safe_load(train("--print_config", defaults={}).out)
    for text in TEXTS.values():
        pairs = options_table(text)
        assert len(pairs) == 13  # eleven rows, one of them with three names
        for name, value in pairs[1:]:  # the first is the sample corpus, wherever it is installed
            default = look_up(config, name)
            written = {"none": "null", "无": "null"}.get(value, value)
            assert written == default or json.loads(written) == default, name
        for name in re.findall(r"--((?:data|model|trainer|checkpoints|samples)\.\w+)", text):
            look_up(config, name)


SAMPLE = """\
# Title

It takes 12 seconds with `python
a.py`, or 44.6 % of 1,246 with [a page](docs/a.md).

```
python a.py  # 3
```

- one `--x`
- two `--y`

## Results

![plot](docs/plot.png)

| | seconds | times |
|---|---|---|
| `a.py` | 182.6 | 1 |
| `b.py` | 11.6 | 15.7 |
| `c.py` | 20.8 | 8.8 |

## Licence

MIT.
"""
TWIN = """\
# 标题

用 `python a.py` 需要 12 秒，占 1,246 的 44.6%，见[一页](docs/a.md)。

```
python a.py  # 3
```

- 一 `--x`
- 二 `--y`

## 结果

![图](docs/plot.png)

| | 秒 | 倍数 |
|---|---|---|
| `a.py` | 182.6 | 1 |
| `b.py` | 11.6 | 15.7 |
| `c.py` | 20.8 | 8.8 |

## 许可证

MIT。
"""


def test_a_sound_translation_is_in_step():
    assert differences(SAMPLE, TWIN) == []
    assert stiffness(TWIN) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("12 秒", "13 秒", "README.md:3 [Title] paragraph 'It takes"),
        ("12 秒", "13 秒", "only in the first 12; only in the second 13"),
        ("15.7", "15.8", "only in the first 15.7; only in the second 15.8"),
        ("44.6%", "44.6", "only in the first 44.6%; only in the second 44.6"),
        ("`--y`", "`--z`", "README.zh-CN.md:10 [标题] item"),
        ("docs/a.md", "docs/b.md", "only in the first ](docs/a.md); only in"),
        ("plot.png", "plan.png", "only in the second ](docs/plan.png)"),
        ("python a.py  # 3", "python a.py # 3", "README.md:6 [Title] code '```"),
        ("python a.py  # 3", "python a.py # 3", "the first python a.py  # 3; only in the second p"),
        ("| 11.6 | 15.7 |", "| 15.7 | 11.6 |", ": the same in another order"),
        ("| `b.py` | 11.6 | 15.7 |\n", "", "README.md:20 [Results] row of 3 '`b.py` | 11.6 | 15"),
        ("| 20.8 | 8.8 |", "| 20.8 |", "[结果] row of 2"),
        ("- 一 `--x`\n", "", "README.md:10 [Title] item '- one `--x`' has nothing like it"),
        ("MIT。", "MIT。\n\n再一段。", "README.zh-CN.md:26 [许可证] paragraph '再一段。' is in"),
        ("## 许可证", "### 许可证", "[Licence] heading## '## Licence' has nothing like it"),
        ("## 许可证\n\nMIT。\n", "", "README.md:23 [Licence] heading## '## Licence' has nothing"),
        ("\n|---|---|---|", "", "README.md:18 [Results] rule of 3"),
    ],
)
def test_what_is_out_of_step_is_found_and_named(old, new, message):
    assert TWIN.count(old) == 1
    found = differences(SAMPLE, TWIN.replace(old, new))
    assert message in "\n".join(found)
    assert len(found) <= 2  # that, and no more


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("用 `python", "用`python", "no space between Chinese and Latin"),
        ("12 秒，", "12 秒, 共", "half-width punctuation: '秒,'"),
        ("MIT。", "It is free for all.", "not translated: 'It is free for all.' in README"),
        ("秒 |", "time in whole seconds |", "not translated: 'time in whole second"),
    ],
)
def test_what_is_not_set_as_chinese_is_found(old, new, message):
    (line,) = stiffness(TWIN.replace(old, new))
    assert message in line
