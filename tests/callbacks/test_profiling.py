"""--profile: what it measures, and that it changes nothing."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.autograd import DeviceType

from lit_gpt.__main__ import main
from lit_gpt.callbacks import profiling
from lit_gpt.checkpoint import read_checkpoint
from lit_gpt.errors import UserError
from tests.conftest import SMALL, command_line, write_text

LONG = {"trainer.max_steps": 32, "trainer.val_check_interval": 16, "model.dropout": 0.1}
LONG |= {"samples.num_tokens": 0, "trainer.log_every_n_steps": 1}
STEP = "Optimizer.step#AdamW.step"


def events_of(folder: Path) -> list[dict]:
    (path,) = folder.glob("trace_*.json.gz")
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def curves_of(folder: Path) -> dict:
    found = json.loads((folder / "history.json").read_text(encoding="utf-8"))["curves"]
    return {n: v for n, v in found.items() if n not in ("time", "tokens_per_second")}


def after(out: str, beginning: str) -> str:
    (line,) = (line for line in out.splitlines() if line.startswith(beginning))
    return line.removeprefix(beginning)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> SimpleNamespace:
    """A profiled run with two batches to a step: its options, folder and output."""
    root = tmp_path_factory.mktemp("profiled")
    options = SMALL | LONG | {"trainer.accumulate_grad_batches": 2}
    options |= {"data.path": write_text(root / "text.txt"), "data.cache": root / "cache"}
    argv = command_line(options | {"trainer.default_root_dir": root / "logs"})
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr("sys.argv", ["train.py"])  # LightningCLI warns if options come twice
        assert main(["train", "--profile", *argv]) == 0
    folder = root / "logs" / "version_0"
    return SimpleNamespace(options=options, folder=folder, out=out.getvalue())


def test_the_run_is_the_same(profiled, train, tmp_path):
    plain = train(**profiled.options)
    folders = [profiled.folder, tmp_path / "logs" / "version_0"]
    assert curves_of(folders[0]) == curves_of(folders[1])
    assert all(line in profiled.out for line in plain.steps)
    saved = [read_checkpoint(f / "checkpoints" / "last.ckpt")["state_dict"] for f in folders]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[1])
    assert "Profile" not in plain.out
    assert "profile: false" in (folders[0] / "config.yaml").read_text()  # asked of this run only


def test_ten_steps_are_traced_and_no_evaluation(profiled):
    """Steps 4 to 13 are timed; the next ten would meet the evaluation after step 16."""
    first = after(profiled.out, "Profile: ")
    assert first.startswith("steps 4 to 13 timed, 17 to 26 traced, ")
    events = events_of(profiled.folder)
    count = Counter(event["name"] for event in events)
    assert count[STEP] == 10
    assert count[profiling.FETCH] == 20
    assert not any("alidation" in name or "_Evaluation" in name for name in count)
    path = after(profiled.out, "Trace, to open at ui.perfetto.dev: ")
    assert path == str(profiled.folder / "trace_steps_17_to_26.json.gz")


def own_times(events: list[dict]) -> dict[str, list[float]]:
    """Microseconds of each operation without those inside of it, from a trace, by name."""
    found: dict[str, list[float]] = {}
    open_by_thread: dict[int, list[list]] = {}
    spans = [e for e in events if e.get("cat") in ("cpu_op", "user_annotation")]
    for e in sorted(spans, key=lambda e: (e["ts"], -e["dur"])):
        outer = open_by_thread.setdefault(e["tid"], [])
        while outer and outer[-1][0] <= e["ts"]:
            outer.pop()
        if outer:
            found[outer[-1][1]][outer[-1][2]] -= e["dur"]
        times = found.setdefault(e["name"], [])
        times.append(e["dur"])
        outer.append([e["ts"] + e["dur"], e["name"], len(times) - 1])
    return found


def test_the_costliest_operations(profiled):
    """The table against the trace, from which own times are computed in another way."""
    lines = profiled.out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("Operation "))
    rows = [re.split(r" {2,}", line) for line in lines[at + 1 : at + 11]]
    assert max(map(len, lines[at - 3 : at + 12])) <= 80
    each = {name: (float(ms), float(calls)) for name, _, ms, calls in rows}
    assert list(each.values()) == sorted(each.values(), key=lambda row: -row[0])
    own = own_times(events_of(profiled.folder))
    for name, (milliseconds, calls) in each.items():
        ends = name.split("...")
        (times,) = (
            times
            for full, times in own.items()
            if full.startswith(ends[0]) & full.endswith(ends[-1])
            if full == name or len(ends) == 2
        )
        assert calls <= len(times) / 10  # one that only calls itself again counts once
        assert milliseconds == pytest.approx(sum(times) / 1e3 / 10, rel=0.02, abs=2e-3)
    shares = [float(share.rstrip("%")) for _, share, *_ in rows]
    assert sum(shares) <= float(after(profiled.out, lines[at + 11][:42]).strip(" %")) + 0.5 <= 100


class Clock(Callback):
    """One second for each batch that is computed, and as many as one asks for to make it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def on_train_batch_start(self, *args: object) -> None:
        self.now += 1.0


@pytest.mark.parametrize("parts", [1, 2])
def test_waiting_for_a_slow_loader(train, monkeypatch, parts):
    from lit_gpt import data

    clock = Clock()
    read = data.read_windows

    def slow(*args, **kwargs):
        clock.now += 3.0
        return read(*args, **kwargs)

    monkeypatch.setattr(data, "read_windows", slow)
    monkeypatch.setattr(profiling, "time", clock)
    options = LONG | {"data.batch_size": 5, "trainer.accumulate_grad_batches": parts}
    out = train("--profile", callbacks=[clock], **options).out
    assert after(out, "Waiting for data: ") == "75.0% of the time"  # 3 of 4 seconds
    assert after(out, "Speed: ") == "20 tokens/s per device"  # 5 windows of 16 tokens in 4 s
    assert after(out, "Profile: ").endswith(", 0% slower")


def test_evaluations_close_to_each_other(train, tmp_path):
    """Only as many steps as lie between two are traced."""
    options = LONG | {"trainer.val_check_interval": 4, "trainer.max_steps": 12}
    result = train("--profile", **options)
    out = result.out
    assert result.err == ""  # where PyTorch's tracer would say that it starts and ends
    assert after(out, "Profile: ").startswith("steps 5 to 8 timed, 9 to 12 traced, ")
    events = events_of(tmp_path / "logs" / "version_0")
    assert sum(event["name"] == STEP for event in events) == 4


@pytest.mark.parametrize("interval", [1, 3, 10, 16, float("inf")])
def test_no_evaluation_is_inside_of_what_is_measured(interval):
    for step in range(25):
        found = profiling.stretch_after(step, interval)
        assert found.steps == min(interval, 10)
        assert found.first > step
        inside = range(found.first, found.last)  # an evaluation after the last one is none inside
        assert not any(s % interval == 0 for s in inside)
        earlier = range(step + 1, found.first)  # nothing could have begun before
        assert all(any(s % interval == 0 for s in range(e, e + found.steps - 1)) for e in earlier)


def test_a_run_that_is_too_short(train, tmp_path):
    result = train("--profile", **LONG | {"trainer.max_steps": 20})
    assert (result.status, result.err) == (0, "")
    line = after(result.out, "Nothing is profiled: ")
    assert line == "this run would need 26 steps, it ends with step 20"
    assert not [*(tmp_path / "logs").rglob("trace*")]


def test_a_run_that_ends_before(train, tmp_path):
    options = LONG | {"trainer.max_time": "00:00:00:00"}
    out = train("--profile", **options).out
    assert after(out, "Nothing is profiled: ") == "the run ended with step 1"
    assert not [*(tmp_path / "logs").rglob("trace*")]


def test_a_resumed_run_warms_up_again(train, tmp_path):
    train(**LONG | {"trainer.max_steps": 6, "trainer.val_check_interval": 100})
    options = LONG | {"trainer.max_steps": 30, "trainer.val_check_interval": 100}
    result = train("--profile", "--ckpt_path=last", **options)
    assert after(result.out, "Profile: ").startswith("steps 10 to 19 timed, 20 to 29 traced, ")
    assert "different options" not in result.out
    events = events_of(tmp_path / "logs" / "version_0")
    assert sum(event["name"] == STEP for event in events) == 10


def test_a_run_that_fails_while_it_is_traced(train):
    class Failing(Callback):
        def on_train_batch_end(self, trainer, *args: object) -> None:
            if trainer.global_step == 20:
                assert torch._C._autograd._profiler_enabled()
                raise UserError("something is wrong")

    result = train("--profile", callbacks=[Failing()], **LONG)
    assert (result.status, result.err) == (2, "error: something is wrong\n")
    assert not torch._C._autograd._profiler_enabled()
    assert "Profile" not in result.out


@pytest.mark.parametrize("other", ["--trainer.profiler=simple", "--find_lr"])
def test_what_it_is_not_used_with(train, other):
    result = train("--profile", other)
    name = other.partition("=")[0]
    assert result.status == 2
    assert result.err == f"error: --profile: can't be used with {name}; leave one of them out\n"


def test_a_trace_that_cannot_be_written(tmp_path):
    class Tracer:
        def export_chrome_trace(self, path: str) -> None:
            Path(path).write_text("{}")

    stretch = profiling.Stretch(4, 10)
    line = profiling.save(Tracer(), tmp_path / "gone", stretch)
    name = "trace_steps_4_to_13.json.gz"
    assert line == f"Could not write {tmp_path / 'gone' / name}: No such file or directory"
    assert profiling.save(Tracer(), tmp_path, stretch).endswith(str(tmp_path / name))
    assert gzip.decompress((tmp_path / name).read_bytes()) == b"{}"


@pytest.mark.parametrize(("device", "share"), [("cpu", "20.0%"), ("cuda", "5.0%")])
def test_which_operations_are_listed(device, share):
    """Of 100 ms: neither spans, nor waiting for others, nor kernels beside their operations."""
    kinds = {"own": False, "span": True, "kernel": False}
    rows = [
        ("aten::mm", "own", 20, 5),
        ("Torch-Compiled Region: 0/0", "span", 10, 2),
        ("[Strategy]backward", "span", 90, 90),
        ("autograd::engine::evaluate_function: MmBackward0", "own", 90, 90),
        ("_c10d_functional::wait_tensor", "own", 90, 90),
        ("gloo:all_reduce", "own", 90, 90),
        ("sgemm", "kernel", 0, 90),
        *((f"aten::op{i:02}{'x' * 50}", "own", 0.1, 0.1) for i in range(12)),
    ]
    averages = [
        SimpleNamespace(
            key=name,
            count=30,
            self_cpu_time_total=1e3 * cpu,
            self_device_time_total=1e3 * gpu,
            is_user_annotation=kinds[kind],
            device_type=DeviceType.CUDA if kind == "kernel" else DeviceType.CPU,
        )
        for name, kind, cpu, gpu in rows
    ]
    tracer = SimpleNamespace(key_averages=lambda: averages)
    stretch = profiling.Stretch(1, 10, seconds=0.1)
    head, *lines, total = profiling.table(tracer, torch.device(device), stretch)
    assert len(lines) == 10
    assert max(map(len, [head, *lines, total])) <= 80
    ms = {"cpu": "2.000", "cuda": "0.500"}[device]
    assert lines[0].split() == ["aten::mm", share, ms, "3.0"]
    assert lines[1].startswith("Torch-Compiled Region: 0/0 ")
    assert lines[2].startswith("aten::op11xxxxxxxxxx...xxxxxxxxxxxxxxxxxx ")
    assert total.split()[-1] == {"cpu": "31.2%", "cuda": "8.2%"}[device]  # 20 + 10 + 12 x 0.1 ms


def event(name: str, start: float, end: float, kind: DeviceType = DeviceType.CPU) -> object:
    times = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=times, device_type=kind)


def test_the_time_between_ranks_on_a_cpu():
    """Two exchanges that overlap, 0 to 50 and 60 to 70; computed until 20 and from 65."""
    events = [
        *(event("gloo:all_reduce", 0, 40), event("gloo:all_reduce", 10, 50)),
        *(event("gloo:all_reduce", 60, 70), event("c10d::allreduce_", 0, 99)),
        *(event("aten::mm", -5, 20), event("aten::mul", 5, 8), event("aten::add", 65, 90)),
        event("[Strategy]backward", -5, 95),
    ]
    assert profiling.between_ranks(events, torch.device("cpu")) == (60, 35)


def test_the_time_between_ranks_on_a_gpu():
    cuda = DeviceType.CUDA
    events = [
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 0, 30, cuda),
        *(event("ampere_sgemm_128x64_tn", 20, 80, cuda), event("aten::mm", 0, 99)),
        event("nccl:all_reduce", 50, 60),  # when it was put into the queue
    ]
    assert profiling.between_ranks(events, torch.device("cuda")) == (30, 20)


@pytest.mark.slow
def test_waiting_for_a_slow_rank(start, tmp_path):
    """Rank 1 sleeps for most of each step, and the trace of rank 0 shows that it waits."""
    callback = "tests.callbacks.slow_rank.LateRank"
    options = {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.callbacks": callback}
    code, out, err = start("--profile", **LONG | options).end()
    assert (code, err) == (0, "")
    text = "\n".join(out)
    assert after(text, "Profile of rank 0 of 2: ").startswith("steps 4 to 13 timed, 17 to 26 ")
    waited = after(text, "Waiting for other ranks: ")
    assert float(waited.partition("%")[0]) > 50
    assert float(after(text, "Waiting for data: ").partition("%")[0]) < 50
    assert len([*(tmp_path / "logs").rglob("trace*")]) == 1
