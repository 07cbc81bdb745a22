"""Says what a run would be, before it trains: takes train.py's options, writes no run."""

import sys
import time

from lit_gpt import errors, lean

BEGIN = time.perf_counter()


def main() -> int:
    with lean.without_unused():
        from lit_gpt import plan  # here, so that Ctrl-C is answered while torch loads

    return plan.main(BEGIN)


if __name__ == "__main__":
    sys.exit(errors.run(main))
