"""Evaluate a checkpoint on any text.

Same as `lit-gpt evaluate`; --help lists the options.
"""

import sys

from lit_gpt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
