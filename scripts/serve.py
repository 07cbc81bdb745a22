"""Answer OpenAI's completions API with a trained model.

Same as `lit-gpt serve`; --help lists the options.
"""

import sys

from lit_gpt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
