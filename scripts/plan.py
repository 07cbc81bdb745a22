"""Says what a run would be, before it trains: takes train.py's options, writes no run."""

import sys
import time

from lit_gpt import lean
from lit_gpt.command import run

BEGIN = time.perf_counter()


def main() -> int:
    with lean.without_unused():
        from lit_gpt.planning import plan

    return plan.main(BEGIN)


if __name__ == "__main__":
    sys.exit(run(main))
