"""Owns data/订单商品名称.csv, the sample corpus: invented order item names, one a line.

Every line is an independent seeded draw from the tables in sample_corpus.yaml.
"""

import argparse
import random
from bisect import bisect
from itertools import accumulate
from pathlib import Path

import yaml

TABLES = Path(__file__).with_name("sample_corpus.yaml")
CORPUS = Path(__file__).resolve().parents[1] / "data" / "订单商品名称.csv"


def pick(rng, options, flatness):
    """Draw one option, the n-th with weight 1 / (n + flatness)."""
    # Only random() is promised to give the same numbers on every Python; choices() is not.
    ends = list(accumulate(1 / (n + flatness) for n in range(1, len(options) + 1)))
    return options[bisect(ends, rng.random() * ends[-1])]


def draw_item(rng, categories, flatness):
    """Draw one item name, level by level from its category down to its packing."""

    def draw(level, options):
        return pick(rng, list(options), flatness[level])

    groups = draw("category", categories.values())
    sellers = ((brand, products) for brands, products in groups.items() for brand in brands.split())
    brand, products = draw("brand", sellers)
    product, varieties, sizes, packings = draw("product", products)
    variety = draw("variety", varieties or [""])
    size = draw("size", sizes or [""])
    packing = draw("packing", packings or [""])

    if size and packing[:1].isdigit():  # a count: 550ml*24瓶
        size, packing = f"{size}*{packing}", ""
    return " ".join(filter(None, [brand, product, variety, size, packing]))


def draw_corpus(rng, tables, characters):
    """Draw whole lines until they hold the wanted number of characters."""
    lines, length = [], 0
    while length < characters:
        line = draw_item(rng, tables["categories"], tables["flatness"]) + "\n"
        lines.append(line)
        length += len(line)
    return "".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Write the sample corpus of order item names.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--characters", type=int, default=324_000)
    parser.add_argument("--out", type=Path, default=CORPUS)
    args = parser.parse_args()

    tables = yaml.safe_load(TABLES.read_text(encoding="utf-8"))
    text = draw_corpus(random.Random(args.seed), tables, args.characters)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(text.encode("utf-8"))  # bytes, so that Windows keeps LF


if __name__ == "__main__":
    main()
