"""Trains a GPT: `python scripts/train.py --help` lists the options."""

import sys

from lit_gpt import errors, lean


def main() -> int:
    with lean.without_unused():
        from lit_gpt import cli  # here, so that Ctrl-C is answered while torch loads

    return cli.main()


if __name__ == "__main__":
    sys.exit(errors.run(main))
