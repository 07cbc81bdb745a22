"""Serves a trained model: OpenAI's /v1/completions, and a page to try prompts on."""

import argparse
import sys

from lit_gpt.command import Parser, at_least_one, run


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add, count = parser.add_argument, at_least_one
    add("--ckpt_path", help="checkpoint to serve; default: the newest run's best")
    add("--logs", default="logs", help="where to look for the newest run (default: %(default)s)")
    add("--host", default="127.0.0.1", help="0.0.0.0: to other machines, too (%(default)s)")
    add("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    add("--max_prompt_tokens", type=count, help="of a prompt; default: what the model sees at once")
    add("--max_tokens", type=count, default=2048, help="to ask for (default: %(default)s)")
    add("--max_concurrent", type=count, default=64, help="requests at a time (%(default)s)")
    add("--max_batch_size", type=count, default=64, help="computed side by side (%(default)s)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from lit_gpt.serving.serve import serve

    serve(options)


if __name__ == "__main__":
    sys.exit(run(main))
