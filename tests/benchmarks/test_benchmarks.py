"""benchmarks/run.py: sides measured in turn, honest ratios, the table and its JSON."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from benchmarks import measure
from benchmarks import run as benchmark
from benchmarks import training as training_benchmark
from benchmarks.measure import Options, Process, Side, flops_per_token, in_turn, report
from benchmarks.parts import recompute
from lit_gpt.command import run as run_command
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig
from tests.conftest import ROOT


def here(*args: object) -> int:
    """Runs a benchmark in this process; its exit status."""
    try:
        return run_command(lambda: benchmark.main([str(arg) for arg in args]))
    except SystemExit as stop:  # of a process that it started
        return int(stop.code)


def test_sides_take_turns():
    calls = []
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b") or len(calls)}
    assert in_turn(sides, 3) == {"a": [None] * 3, "b": [2, 4, 6]}
    assert calls == ["a", "b"] * 3
    assert median([9.0, 1.0, 2.0]) == 2.0
    with pytest.raises(UserError, match="repeats 0: must be at least 1"):
        in_turn(sides, 0)


def test_the_loss_in_parts_is_timed_as_a_run_takes_it(tmp_path, capsys):
    assert here("loss", "--targets", 600, "--width", 8, "--repeats", 1, "--out", tmp_path) == 0
    rows = json.loads((tmp_path / "loss.json").read_text())["rows"]
    names = [row["name"] for row in rows]
    assert names[:2] == ["1,245 tokens, all at once", "1,245 tokens, 600 targets at a time"]
    assert names[-1] == "13,340 tokens, 150 targets at a time"  # at most 8 MB of logits
    assert all(row["value"] > 0 for row in rows)
    assert here("loss", "--targets", 0) == 2
    assert "targets 0: must be at least 1" in capsys.readouterr().err


def test_the_table_and_the_json_say_the_same(tmp_path, capsys):
    rows = [Side("plain", 200.0, "seconds", loss=3.5), Side("ours", 16.0, "seconds", 12.5, 3.25)]
    report("loop", rows, str(tmp_path / "new"), "A note.")
    out = capsys.readouterr().out
    assert "12.50" in out
    assert "3.2500" in out
    assert "A note." in out
    assert "peak memory" not in out  # no column without a value
    content = json.loads((tmp_path / "new" / "loop.json").read_text())
    assert [(row["name"], row["ratio"]) for row in content["rows"]] == [
        ("plain", 1),
        ("ours", 12.5),
    ]
    machine = content["machine"]
    assert machine["torch"] == torch.__version__
    for name in ("processor", "threads", "python"):
        assert f"{name} {machine[name]}, " in out
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"out .*: can't be written .*; name another folder"):
        report("loop", rows, str(tmp_path / "file"))


def test_tokenize_measures_both_sides_in_processes(tmp_path, text_file):
    argv = ("--path", text_file, "--megabytes", 1, "--repeats", 1, "--out", tmp_path)
    assert here("tokenize", *argv) == 0
    plain, ours = json.loads((tmp_path / "tokenize.json").read_text())["rows"]
    assert ours["ratio"] == pytest.approx(ours["value"] / plain["value"])
    assert plain["ratio"] == 1
    assert 50 < ours["peak_mb"] < 2000
    assert list(tmp_path.glob("*/")) in ([], [text_file])  # nothing else left behind


def test_generate_measures_one_sequence_and_many(tmp_path):
    assert here("generate", "--tokens", 8, "--repeats", 1, "--out", tmp_path) == 0
    rows = json.loads((tmp_path / "generate.json").read_text())["rows"]
    assert [row["name"].split("batch of ")[1] for row in rows] == ["1", "1", "32", "32"]
    assert [row["ratio"] for row in rows][::2] == [1, 1]


def test_overhead_is_of_the_default_job(tmp_path, capsys):
    assert here("overhead", "--repeats", 1, "--out", tmp_path) == 0
    bare, inside = json.loads((tmp_path / "overhead.json").read_text())["rows"]
    assert inside["ratio"] == pytest.approx(bare["value"] / inside["value"])
    assert f"{inside['value'] / bare['value'] - 1:.1%}" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "sides"), [("loop", 3), ("charlm", 3)])
def test_whole_runs_are_compared_with_the_reference(kind, sides, tmp_path, monkeypatch):
    """Which processes are run, and what becomes of their results."""
    commands = []

    def run_script(script: str, *argv: str) -> Process:
        commands.append((script, *argv))
        return Process(60.0, None, 'Some lines\n{"loss": 3.0}\n')

    def run_training(folder: str, *argv: str) -> tuple[Process, float]:
        assert list(Path(folder).iterdir()) == []  # so that the text is encoded anew
        commands.append(argv)
        return Process(5.0, None, ""), 2.0

    monkeypatch.setattr(training_benchmark, "run_script", run_script)
    monkeypatch.setattr(training_benchmark, "run_training", run_training)
    path = tmp_path / "text"
    path.write_text("some text")
    options = Options(path=str(path), repeats=2, out=str(tmp_path))
    getattr(training_benchmark, kind)(options, steps=7)
    assert len(commands) == 2 * sides
    for i, command in enumerate(commands):
        if i % sides == 0:
            script = f"benchmarks/reference_{kind}.py"
            assert command == (script, "--path", str(path), "--steps", "7")
        else:
            assert command[0] == f"--data.path={path}"
            assert command[-1] == "--trainer.max_steps=7"  # last, where it wins over a config's
    rows = json.loads((tmp_path / f"{kind}.json").read_text())["rows"]
    assert [(row["ratio"], row["loss"]) for row in rows] == [(1, 3.0), (12, 2.0), (12, 2.0)]


def test_a_process_gives_its_seconds_memory_and_final_loss(text_file, tmp_path):
    argv = ["--path", str(text_file), "--steps", "2"]
    process = measure.run_script("benchmarks/reference_charlm.py", *argv)
    assert process.seconds > 0.5
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # the least that Linux reports
    assert 100 < process.peak_mb < max(2000, 1.1 * ours)
    assert 5 < process.result()["loss"] < 6  # about ln 256
    process, loss = measure.run_training(
        str(tmp_path), f"--data.path={text_file}", "--data.tokenizer=bytes", "--trainer.max_steps=1"
    )
    assert f"Final validation loss: {loss:.4f}" in process.output


def test_without_a_gpu_it_says_so(tmp_path):
    """As a process, from another folder."""
    if torch.cuda.is_available():
        pytest.skip("there is one")
    script = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "gpu", "--out", "results"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert (done.returncode, done.stdout) == (0, "No NVIDIA GPU here: nothing to measure\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["speed"], "no benchmark 'speed'; use one of loop, step, start, overhead"),
        (["generate", "--repeats", "0"], "--repeats 0: must be at least 1"),
        (["tokenize", "--path", "nowhere.txt"], "--path 'nowhere.txt': no text file"),
        (["loop", "--path", "nowhere.txt"], "--path 'nowhere.txt': no text file"),
        (["charlm", "--path", "data"], "--path 'data': no text file"),
        (["generate", "--tokens", "0"], "--tokens 0: must be at least 1"),
        (["charlm", "--steps", "-1"], "--steps -1: must be at least 1"),
        (["tokenize", "--megabytes", "0"], "--megabytes 0: must be at least 1"),
        (["by_hand", "--given", "gpt2"], "--given 'gpt2': must begin one of cl100k_base, 64 x 2; "),
        (["by_hand", "--path", "nowhere.txt"], "--path 'nowhere.txt': no text file"),
        (["gpu", "--batch_size", "many"], "--batch_size 'many': must be a whole number"),
        (["plan", "--path", "nowhere.txt"], "--path 'nowhere.txt': no text file"),
        (["plan", "--steps", "0"], "--steps 0: must be at least 1"),
        (["plan", "--config", "none.yaml", "--repeats", "1"], "none.yaml"),
        (["overhead", "--path", "nowhere.txt"], "'nowhere.txt': no such file or folder"),
    ],
)
def test_wrong_input_is_one_line(args, message, capsys):
    assert here(*args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_help_lists_the_kinds_and_their_options(capsys):
    assert here() == 0
    listed = capsys.readouterr().out
    for kind in (
        "loop",
        "step",
        "overhead",
        "charlm",
        "race",
        "by_hand",
        "generate",
        "tokenize",
        "plan",
        "gpu",
    ):
        assert f"\n  {kind} " in listed
        assert here(kind, "--help") == 0
        described = capsys.readouterr().out
        assert all(f"--{option} " in described for option in ("repeats", "out", "path"))


@pytest.mark.slow
def test_plan_compares_what_it_predicts_with_the_run(tmp_path, text_file):
    config = tmp_path / "small.yaml"
    config.write_text("model: {d_model: 16, num_blocks: 1}\ndata: {context_length: 16}\n")
    argv = ("--path", text_file, "--config", config, "--steps", 3, "--repeats", 1)
    assert here("plan", *argv, "--out", tmp_path) == 0
    real, predicted = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert predicted["ratio"] == pytest.approx(predicted["value"] / real["value"])
    assert 0.2 < predicted["ratio"] < 5
    assert 0.5 < predicted["peak_mb"] / real["peak_mb"] < 2


def test_flops_follow_palms_formula():
    """GPT-2 124M: 6 N + 12 L C T with N the weights that multiply."""
    tied = GPTConfig(50_304, 1024, 768, 12, 12, position="learned", bias=False, tie_embeddings=True)
    weights = 50_304 * 768 + 1024 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768
    assert flops_per_token(tied, GPT(tied)) == 6 * weights + 12 * 12 * 768 * 1024
    small = {"d_model": 8, "num_blocks": 1, "num_heads": 1, "bias": False}
    untied, tied = (GPTConfig(10, 4, tie_embeddings=tie, **small) for tie in (False, True))
    assert flops_per_token(untied, GPT(untied)) == flops_per_token(tied, GPT(tied))
    paired = GPTConfig(10, 4, smear=True, bigram_rows=50, **small)
    assert flops_per_token(paired, GPT(paired)) == flops_per_token(tied, GPT(tied))


def test_the_plain_way_sees_the_whole_window_each_time():
    model = GPT(GPTConfig(11, 4, d_model=8, num_blocks=1, num_heads=1)).eval()
    seen = []
    model.embedding.register_forward_hook(lambda _, args, out: seen.append(args[0].shape))
    recompute(model, torch.zeros(2, 3, dtype=torch.long), 3)
    assert seen == [(2, 3), (2, 4), (2, 4)]
