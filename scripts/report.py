"""Writes the report of one run, or one page of several: `python scripts/report.py --help`."""

import argparse
import sys

from lit_gpt.command import Parser, run


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run's folder, or its number below --logs")
    add("--logs", default="logs", help="where runs with a number are (default: %(default)s)")
    add("--out", metavar="FILE", help="default: report.html in the run's folder, or in --logs")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from lit_gpt.reports.report import write_reports

    write_reports(options)


if __name__ == "__main__":
    sys.exit(run(main))
