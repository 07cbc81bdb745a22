"""Kills training runs at random moments and checks that they go on as if nothing had happened."""

import sys
from argparse import Namespace

from lit_gpt import errors


def parse(settings: list[str]) -> Namespace:
    parser = errors.Parser(description=__doc__)
    parser.add_argument(
        "--kills", type=errors.at_least_one, default=20, help="for each setting (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--settings", nargs="+", choices=settings, default=settings, help="(all)")
    parser.add_argument("--path", default="data/订单商品名称.csv", help="a text file (%(default)s)")
    return parser.parse_args()


def main() -> int:
    from lit_gpt import verification  # here, so that Ctrl-C is answered while torch loads

    return verification.main(parse(list(verification.SETTINGS)))


if __name__ == "__main__":
    sys.exit(errors.run(main))
