"""Kills training runs at random moments and checks that they resume bit for bit."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from any folder

from lit_gpt.command import call, run
from tests.kill_test.verification import verify

if __name__ == "__main__":
    sys.exit(run(lambda: call(verify, sys.argv[1:], prog=Path(__file__).name)))
