"""Writes data/订单商品名称.csv, the sample corpus: synthetic product names, one a line.

Lines are seeded draws from the tables in sample_corpus.yaml. No two of them are the same or differ
in their numbers alone, so nothing in one part of the file was seen, sizes aside, in another.
"""

from __future__ import annotations

import argparse
import random
import re
from bisect import bisect
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def pick(rng: random.Random, options: list[Any], flatness: float) -> Any:
    """Draws one option, the n-th with weight 1 / (n + flatness)."""
    # Of all draws, only random() is promised to be the same on every Python.
    ends = list(accumulate(1 / (n + flatness) for n in range(1, len(options) + 1)))
    return options[bisect(ends, rng.random() * ends[-1])]


def draw_name(rng: random.Random, categories: dict, flatness: dict[str, float]) -> str:
    """Draws one name, level by level from its category down to its packing."""

    def draw(level: str, options: Iterable[Any]) -> Any:
        return pick(rng, list(options), flatness[level])

    groups = draw("category", categories.values())
    sellers = ((brand, products) for brands, products in groups.items() for brand in brands.split())
    brand, products = draw("brand", sellers)
    product, varieties, sizes, packings = draw("product", products)
    variety = draw("variety", varieties or [""])
    size = draw("size", sizes or [""])
    packing = draw("packing", packings or [""])

    if size and packing[:1].isdigit():  # a count: 550ml*24瓶
        size = f"{size}*{packing}"
        packing = ""
    return " ".join(filter(None, [brand, product, variety, size, packing]))


def draw_corpus(seed: int, characters: int) -> str:
    """Draws whole lines until they have at least that many characters, line ends included."""
    tables = yaml.safe_load((FOLDER / "sample_corpus.yaml").read_text(encoding="utf-8"))
    rng = random.Random(seed)
    lines: dict[str, str] = {}  # by what they say without their numbers
    length = 0
    while length < characters:
        line = draw_name(rng, tables["categories"], tables["flatness"]) + "\n"
        key = NUMBER.sub("0", line)
        if key not in lines:
            lines[key] = line
            length += len(line)
    # What is popular is drawn early; in a random order, the end is like the beginning.
    return "".join(sorted(lines.values(), key=lambda line: rng.random()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the sample corpus.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--characters", type=int, default=324_000)
    parser.add_argument("--out", type=Path, default=FOLDER / "订单商品名称.csv")
    args = parser.parse_args()

    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = draw_corpus(args.seed, args.characters)
    args.out.write_bytes(text.encode("utf-8"))  # bytes, so that Windows keeps LF


if __name__ == "__main__":
    main()
