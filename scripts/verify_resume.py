"""Kills training runs at random moments and checks that they go on as if nothing had happened."""

import sys
from argparse import Namespace

from lit_gpt import errors
from lit_gpt.killed_run import SETTINGS


def parse() -> Namespace:
    parser = errors.Parser(description=__doc__)
    parser.add_argument(
        "--kills", type=errors.at_least_one, default=20, help="for each setting (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS, help="(all)")
    parser.add_argument("--path", default="data/订单商品名称.csv", help="a text file (%(default)s)")
    return parser.parse_args()


def main() -> int:
    options = parse()
    from lit_gpt import verification  # after the options: torch takes a while

    return verification.main(options)


if __name__ == "__main__":
    sys.exit(errors.run(main))
