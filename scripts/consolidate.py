"""Make one ordinary file of a sharded checkpoint.

Same as `lit-gpt consolidate`; --help lists the options.
"""

import sys

from lit_gpt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["consolidate", *sys.argv[1:]]))
