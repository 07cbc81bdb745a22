"""Lets a trained model write: `python scripts/generate.py --help` lists the options."""

import argparse
import sys

from lit_gpt.command import Parser, run


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--ckpt_path", help="checkpoint to use; default: the newest run's best")
    add("--logs", default="logs", help="where to look for the newest run (default: %(default)s)")
    add("--prompt", action="append", help="text to go on from; default: a new line, or document")
    add("--prompt_file", help="a text file with a prompt in each line")
    add("--interactive", action="store_true", help="ask for prompts; /help lists its commands")
    add("--max_new_tokens", type=int, default=100, help="default: %(default)s")
    add("--stop", action="append", help=r"end before this text (\n: at the line's end)")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest (%(default)s)")
    add("--top_k", type=int, help="only the k likeliest tokens (default: all)")
    add("--top_p", type=float, default=1.0, help="only the likeliest, up to this share (1.0)")
    add("--min_p", type=float, default=0.0, help="only this share as likely as the likeliest (0)")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: fewer repeats (1.0)")
    add("--num_samples", type=int, default=1, help="of each prompt; default: %(default)s")
    add("--seed", type=int, default=1337, help="of the first sample; the next use the next ones")
    add("--trace", action="store_true", help="show the likeliest tokens of each step")
    add("--json", action="store_true", help="print each completion as a line of JSON")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from lit_gpt.generation import generate, interactive

    write = interactive.converse if options.interactive else generate.write_samples
    write(options)


if __name__ == "__main__":
    sys.exit(run(main))
