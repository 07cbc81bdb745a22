"""Kills training runs at random moments and checks that they go on as if nothing had happened."""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # found from anywhere

from lit_gpt.command import Parser, at_least_one, run
from tests.kill_test.killed_run import SETTINGS


def parse() -> Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--kills", type=at_least_one, default=20, help="for each setting (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS, help="(all)")
    parser.add_argument("--path", default="data/订单商品名称.csv", help="a text file (%(default)s)")
    return parser.parse_args()


def main() -> int:
    options = parse()
    from tests.kill_test import verification

    return verification.main(options)


if __name__ == "__main__":
    sys.exit(run(main))
