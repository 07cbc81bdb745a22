"""Exports a trained model as a Hugging Face folder: `python scripts/export.py --out DIR`."""

import argparse
import sys

from lit_gpt.command import Parser, run


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--out", required=True, help="folder to make; it may be there, if it is empty")
    add("--ckpt_path", help="checkpoint to export; default: the newest run's best")
    add("--logs", default="logs", help="where to look for the newest run (default: %(default)s)")
    add("--data_path", help="text to compare the export on; default: that of the run")
    add("--encoding", help="of that text; default: utf-8, of the run's own as in the run")
    add("--text_field", help="of its documents; default: none, of the run's own as in the run")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from lit_gpt.huggingface.export import export

    export(options)


if __name__ == "__main__":
    sys.exit(run(main))
