"""Search for good settings.

Same as `lit-gpt sweep`; --help lists the options.
"""

import sys

from lit_gpt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
