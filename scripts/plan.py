"""Predict a run's time and memory before it starts.

Same as `lit-gpt plan`; --help lists the options.
"""

import sys

from lit_gpt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
