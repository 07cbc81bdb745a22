"""Train a GPT on a text.

Same as `lit-gpt train`; --help lists the options.
"""

import sys

from lit_gpt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
