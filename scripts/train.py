"""Trains a GPT: `python scripts/train.py --help` lists the options."""

import sys

from lit_gpt import lean
from lit_gpt.command import run


def main() -> int:
    with lean.without_unused():
        from lit_gpt.training import train

    return train.main()


if __name__ == "__main__":
    sys.exit(run(main))
