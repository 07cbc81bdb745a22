"""Measures lit_gpt beside the plain way: `python scripts/benchmark.py --help` lists what."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found from anywhere

from lit_gpt.command import Parser, at_least_one, run


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--repeats", type=int, default=3, help="of each side (%(default)s)")
    shared.add_argument("--out", default="logs/benchmark", help="folder for JSON (%(default)s)")
    shared.add_argument("--path", default="data/订单商品名称.csv", help="a text file")
    for kind, text in {
        "loop": "the default job against the classic loop in plain PyTorch (12 minutes)",
        "overhead": "a step inside the Trainer against a bare one",
        "charlm": "a byte-level model on --path against nanoGPT's recipe",
        "generate": "with a key/value cache against the whole window each token",
        "tokenize": "text file to token cache against tiktoken",
        "plan": "the time and memory that plan.py says against train.py's",
        "gpu": "GPT-2 124M's shape, eager and compiled",
    }.items():
        kinds.add_parser(kind, parents=[shared], help=text, description=text)
    kinds.choices["plan"].add_argument("--config", help="a YAML file of options for both")
    for kind in ("loop", "charlm", "plan"):
        kinds.choices[kind].add_argument(
            "--steps", type=at_least_one, help="instead of the usual number"
        )
    kinds.choices["generate"].add_argument("--tokens", type=at_least_one, default=256)
    kinds.choices["tokenize"].add_argument("--megabytes", type=at_least_one, default=50)
    kinds.choices["tokenize"].add_argument("--only_ours", action="store_true")
    kinds.choices["gpu"].add_argument("--batch_size", type=at_least_one, default=32)
    return parser.parse_args()


def main() -> None:
    options = parse()
    from benchmarks import parts, plan, training

    kinds = {
        "loop": training.loop,
        "overhead": training.overhead,
        "charlm": training.charlm,
        "generate": parts.generation,
        "tokenize": parts.tokenization,
        "plan": plan.plan,
        "gpu": parts.gpu,
    }
    kinds[options.kind](options)


if __name__ == "__main__":
    sys.exit(run(main))
