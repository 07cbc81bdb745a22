"""Trains a GPT: `python scripts/train.py --help` lists the options."""

import sys

from lit_gpt import errors
from lit_gpt.cli import main

if __name__ == "__main__":
    sys.exit(errors.run(main))
