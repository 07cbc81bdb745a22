"""Searches good settings with Optuna: `python scripts/sweep.py --config configs/sweep.yaml`.

Further options are train.py's, for all trials: `--trainer.max_steps=100`.
"""

import argparse
import sys

from lit_gpt.command import Parser, run


def main() -> int:
    parser = Parser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", default="configs/sweep.yaml", help="what to search (default: %(default)s)")
    add("--trials", type=int, help="how many in all, those done before included")
    add("--study", help="folder of the study and its runs; a study there goes on")
    options, more = parser.parse_known_args()
    from lit_gpt.tuning.sweep import sweep

    return sweep(options, more)


if __name__ == "__main__":
    sys.exit(run(main))
