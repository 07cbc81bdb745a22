"""Write a folder that transformers loads.

Same as `lit-gpt export`; --help lists the options.
"""

import sys

from lit_gpt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
