"""What goes wrong around a run: other processes and files, full disks, broken pipes, crashes, memory, poor systems.

Whatever it is, the last good checkpoint stays, files are whole or absent, and the run says what happened: on one line
where the fault lies outside, with a traceback where it is a bug. Exit codes: 0 finished, 75 stopped by a signal, 2 for
an error, 1 where the last checkpoint could not be written or for a bug.
"""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, Child, assert_same_outcome, checkpoint, files, notes, quick, read_csv

import dqn_softmoe
import rainbow_softmoe
from dqn_softmoe import Args, free_memory, main

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def args(tmp_path):
    """Args of a run in tmp_path / "run"."""
    return Args(**quick(runs_dir=str(tmp_path), run_name="run", resume="auto"))


@pytest.fixture
def child(tmp_path_factory, args):
    """Calls `patch()` and then the run in a process of its own; returns exit code, stdout, stderr."""

    def call(patch=lambda: None, **overrides) -> tuple[int, str, str]:
        def run():
            dqn_softmoe.LOG_EVERY = 100
            patch()
            main(replace(args, **overrides))

        return Child(tmp_path_factory.mktemp("child"), run).wait()

    return call


def error(text: str) -> str:
    """The one line that stderr holds."""
    (line,) = notes(text)
    assert line.startswith("error: ")
    return line


def fails(owner, name: str, calls, exception: Exception) -> None:
    """Make these calls of `owner.name`, counted from 1, raise; in a child, where nothing puts it back."""
    original, count = getattr(owner, name), [0]

    def counted(*arguments, **keywords):
        count[0] += 1
        if count[0] in calls:
            raise exception
        return original(*arguments, **keywords)

    setattr(owner, name, counted)


def resumes(args: Args, step: int) -> None:
    """The run goes on from this step to its end, and its records know of no step twice."""
    run = Path(args.runs_dir) / "run"
    assert checkpoint(run)["progress"]["global_step"] == step
    main(replace(args, total_timesteps=800))
    assert checkpoint(run)["progress"]["global_step"] == 800
    assert [int(row["global_step"]) for row in read_csv(run / "metrics.csv")] == [200, 400, 600, 800]
    assert sum(int(row["episodes"]) for row in read_csv(run / "metrics.csv")) == len(read_csv(run / "episodes.csv"))
    assert list(run.rglob("*.tmp")) == []


# -------------------------------------------------------------------------------------- other processes and files
def test_a_second_process_changes_nothing(args, child, tmp_path):
    def first():
        send = dqn_softmoe.Environments.send
        dqn_softmoe.Environments.send = lambda *_: (time.sleep(0.01), send(*_))
        main(args)

    running = Child(tmp_path.parent, first)
    while not (tmp_path / "run" / "metrics.csv").exists():
        time.sleep(0.01)
    config = (tmp_path / "run" / "config.json").read_bytes()
    for resume in ("auto", str(tmp_path / "run")):
        code, out, err = child(resume=resume)
        assert (code, out) == (2, "") and "in use by another process" in error(err)
    assert (tmp_path / "run" / "config.json").read_bytes() == config
    assert running.wait()[0] == 0
    main(replace(args, resume=None, run_name="unbroken"))
    assert_same_outcome(tmp_path / "run", tmp_path / "unbroken")


def no_locks() -> None:
    import fcntl

    fails(fcntl, "flock", [1], OSError(errno.ENOTSUP, "Operation not supported"))


def no_fcntl() -> None:
    sys.modules["fcntl"] = None


@pytest.mark.parametrize("patch", [no_locks, no_fcntl])
def test_without_locks_a_warning_and_the_run(child, patch):
    code, _, err = child(patch)
    (line,) = notes(err)
    assert code == 0 and line.startswith("warning: nothing keeps a second process from")


def test_files_of_the_user_are_neither_read_nor_touched(args, tmp_path):
    run = tmp_path / "run"
    main(replace(args, total_timesteps=300, checkpoint_every=100))
    (run / "checkpoint-best").mkdir()
    mine = "checkpoint-best/state.pt", "checkpoint-at400", "checkpoint.pt.bak", "checkpoint-9.pt", "notes.txt"
    for name in mine:
        (run / name).write_text(name)
    before = {name: files(run)[name] for name in mine}
    main(replace(args, checkpoint_every=100))
    main(replace(args, total_timesteps=800, checkpoint_every=100, checkpoint_at_end=False))
    assert {name: files(run)[name] for name in mine} == before


# ------------------------------------------------------------------------------------------------- failed writes
def fails_half_way(name: str, calls) -> None:
    """Writing this file fails in the middle, at these attempts."""
    original, count = dqn_softmoe.write_file, [0]

    def write_file(path, write):
        count[0] += path.name == name
        if path.name == name and count[0] in calls:
            original(path, write_half)
        original(path, write)

    def write_half(file):
        file.write(b"half")
        raise FULL

    dqn_softmoe.write_file = write_file


def limited(name: str, size: int):
    """The operating system ends this file at that size."""
    resource = pytest.importorskip("resource")

    def patch():
        original = dqn_softmoe.write_file
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        def write_file(path, write):
            if path.name == name:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))
            try:
                original(path, write)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))

        dqn_softmoe.write_file = write_file

    return patch


def all_whole(run: Path) -> None:
    for path in run.rglob("*.json"):
        json.loads(path.read_text())
    for path in run.rglob("*.pt"):
        torch.load(path, weights_only=True)
    assert list(run.rglob("*.tmp")) == []


@pytest.mark.parametrize("size", [0, 20_000, 400_000])
def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(args, child, tmp_path, size):
    """The operating system's own error, at the beginning, in the networks and in the replay."""
    code, out, err = child(limited("checkpoint.pt", size))
    assert code == 1 and "600 agent steps done" in out
    (line,) = notes(err)
    assert line.startswith("warning: ") and "step 600" in line
    run = tmp_path / "run"
    assert not (run / "checkpoint.pt").exists() and (run / "weights.pt").exists() and (run / "eval.json").exists()
    all_whole(run)


def test_a_checkpoint_that_fails_once_is_made_up_for_by_the_next(args, child, tmp_path):
    code, _, err = child(lambda: fails_half_way("checkpoint.pt", [2]), checkpoint_every=200)
    (line,) = notes(err)
    assert code == 0 and line.startswith("warning: ") and "step 400" in line and str(FULL) in line
    resumes(args, 600)


def test_a_last_checkpoint_that_fails(args, child, tmp_path):
    code, out, err = child(lambda: fails_half_way("checkpoint.pt", [2, 3]), checkpoint_every=200)
    assert code == 1 and len(notes(err)) == 2 and "600 agent steps done" in out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["finished"] == 0
    resumes(replace(args, checkpoint_every=200), 200)


OTHER_FILES = {  # what fails -> the step that the run goes on from
    "weights": (limited("weights.pt", 20_000), 600),
    "weights in mid-run": (limited("500.pt", 20_000), 500),
    "evaluation": (limited("eval.json", 50), 600),
    "configuration at the end": (lambda: fails_half_way("config.json", [2]), 600),
}


@pytest.mark.parametrize("patch, step", OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_that_does_not_fit(args, child, tmp_path, patch, step):
    code, _, err = child(patch, weights_every=500)
    assert code == 2 and ("No space left" in error(err) or "File too large" in error(err))
    all_whole(tmp_path / "run")
    resumes(args, step)


def test_a_configuration_that_does_not_fit(child, tmp_path):
    code, _, err = child(limited("config.json", 100))
    assert code == 2 and "File too large" in error(err)
    assert files(tmp_path) == {}


class FullCsv:
    def __init__(self, file):
        self.file, self.rows = file, 0

    def write(self, row):
        self.rows += 1
        if self.rows == 2:
            self.file.write(row[:3])
            raise FULL
        self.file.write(row)

    def close(self):
        self.file.close()


def test_a_record_that_does_not_fit(args, child):
    def patch():
        original = dqn_softmoe.open_csv
        dqn_softmoe.open_csv = lambda path, *more: (FullCsv((opened := original(path, *more))[0]), opened[1])

    code, _, err = child(patch)
    assert code == 2 and "No space left" in error(err)
    resumes(args, 80)  # the first four games end together, of which the second's row is cut off


def full_tensorboard() -> None:
    from tensorboard.summary.writer import record_writer

    fails(record_writer.RecordWriter, "write", range(20, 10**6), FULL)
    threading.excepthook = lambda _: None  # TensorBoard's own thread dies of it


def full_tensorboard_flush() -> None:
    from tensorboard.summary.writer import record_writer

    fails(record_writer.RecordWriter, "flush", range(2, 10**6), FULL)
    threading.excepthook = lambda _: None


@pytest.mark.parametrize("patch", [full_tensorboard, full_tensorboard_flush])
def test_curves_that_do_not_fit(args, child, tmp_path, patch):
    """They are no reason to lose a checkpoint that does."""
    code, _, err = child(patch, checkpoint_every=400)
    assert code == 2 and "No space left" in notes(err)[-1]
    assert "Traceback" not in err
    assert checkpoint(tmp_path / "run")["progress"]["global_step"] >= 80


# -------------------------------------------------------------------------------------------------- broken pipes
COMMAND = [sys.executable, str(ROOT / "dqn_softmoe.py")]


def environment(**more: str) -> dict:
    return os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"} | more


def test_nobody_reads_any_more(tmp_path):
    """Like `2>&1 | head`: the run stops, but saves what it has done."""
    line = [*COMMAND, "--env-id", "pixel_game:PixelCatch-v0", "--encoder", "nature", "--no-cuda", "--run-name", "run"]
    line += ["--buffer-size", "1000", "--learning-starts", "1000000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": environment(), "cwd": tmp_path}
    run = subprocess.Popen([sys.executable, "-c", FAST_BAR, *line[1:]], **pipes)
    read = run.stdout.readline()
    while b"%|" not in read:
        read = run.stdout.read1(200)
    run.stdout.close()
    assert run.wait(timeout=60) == 2
    step = checkpoint(tmp_path / "runs" / "run")["progress"]["global_step"]
    assert step > 0
    all_whole(tmp_path / "runs" / "run")


# A bar writes every 30 s where it is no terminal.
FAST_BAR = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.stderr.isatty = lambda: True
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# --------------------------------------------------------------------------------------------------- bugs, not faults
@pytest.mark.parametrize("where", ["Environments.recv", "Agent.update", "Agent.act"])
def test_a_bug_in_mid_run_has_a_traceback_and_loses_no_round(args, child, where):
    def patch():
        owner, name = where.split(".")
        calls = {"recv": 90, "act": 90, "update": 40}[name]
        fails(getattr(dqn_softmoe, owner), name, [calls], RuntimeError("CUDA error: an illegal memory access"))

    code, _, err = child(patch)
    assert code == 1 and "Traceback" in err and "CUDA error: an illegal memory access" in err
    assert "warning" not in err
    resumes(args, 356)


def test_a_bug_while_saving_is_no_full_disk(args, child):
    bug = RuntimeError("CUDA error: device-side assert triggered")
    code, _, err = child(lambda: fails(torch, "save", [2, 3], bug), checkpoint_every=200)
    assert code == 1 and "Traceback" in err and "device-side assert" in err and "warning" not in err
    resumes(replace(args, checkpoint_every=200), 200)


def poisoned(good: int) -> None:
    """`td_loss` is NaN after this many good updates."""
    original, count = dqn_softmoe.td_loss, [0]

    def td_loss(*arguments):
        loss, metrics, output = original(*arguments)
        count[0] += 1
        factor = 1.0 if count[0] <= good else math.nan
        return loss * factor, {name: value * factor for name, value in metrics.items()}, output

    dqn_softmoe.td_loss = td_loss


@pytest.mark.parametrize("log_every", [100, 10_000], ids=["seen in the records", "seen in the weights"])
def test_a_loss_that_is_not_finite_reaches_no_checkpoint(args, child, tmp_path, log_every):
    """Updates after 200 steps, one in 4; the checkpoint of 400 is the last good one."""

    def patch():
        dqn_softmoe.LOG_EVERY = log_every
        poisoned(60)

    code, _, err = child(patch, checkpoint_every=200)
    line = error(err)
    assert code == 2 and f"{500 if log_every == 100 else 600}" in line and str(tmp_path / "run/checkpoint.pt") in line
    assert all(weight.isfinite().all() for weight in checkpoint(tmp_path / "run")["q_network"].values())
    assert not (tmp_path / "run" / "weights.pt").exists()
    resumes(replace(args, checkpoint_every=200), 400)


# -------------------------------------------------------------------------------------------------------- memory
GB = 10**9
UNLIMITED_V1 = "9223372036854771712"
MEMORY = {  # files of the system -> bytes that are free
    "no limit": ({"/proc/self/cgroup": "0::/\n"}, 8 * GB),
    "v2, its own": (
        {
            "/proc/self/cgroup": "0::/a/b\n",
            "/sys/fs/cgroup/a/b/memory.max": f"{5 * GB}\n",
            "/sys/fs/cgroup/a/b/memory.stat": f"anon {GB}\nfile {GB}\n",
        },
        4 * GB,
    ),
    "v2, its parent's": (
        {
            "/proc/self/cgroup": "0::/a/b\n",
            "/sys/fs/cgroup/a/b/memory.max": "max\n",
            "/sys/fs/cgroup/a/b/memory.stat": f"anon {GB}\n",
            "/sys/fs/cgroup/a/memory.max": f"{3 * GB}\n",
            "/sys/fs/cgroup/a/memory.stat": f"anon {2 * GB}\n",
        },
        GB,
    ),
    "v2, the system has less": (
        {
            "/proc/self/cgroup": "0::/a\n",
            "/sys/fs/cgroup/a/memory.max": f"{50 * GB}\n",
            "/sys/fs/cgroup/a/memory.stat": "anon 0\n",
        },
        8 * GB,
    ),
    "v1, a job's": (
        {
            "/proc/self/cgroup": "9:cpu,cpuacct:/slurm/job\n4:memory:/slurm/job\n0::/other\n",
            "/sys/fs/cgroup/memory/slurm/job/memory.limit_in_bytes": f"{UNLIMITED_V1}\n",
            "/sys/fs/cgroup/memory/slurm/job/memory.stat": f"cache {GB}\ntotal_rss {GB}\n",
            "/sys/fs/cgroup/memory/slurm/memory.limit_in_bytes": f"{6 * GB}\n",
            "/sys/fs/cgroup/memory/slurm/memory.stat": f"rss 0\ntotal_rss {4 * GB}\n",
        },
        2 * GB,
    ),
    "v1, a container's, which sees another root": (
        {
            "/proc/self/cgroup": "4:memory:/docker/0123\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GB}\n",
            "/sys/fs/cgroup/memory/memory.stat": f"total_rss {GB // 2}\n",
        },
        2 * GB - GB // 2,
    ),
}


def fake_system(patch: pytest.MonkeyPatch, files: dict[str, str] | None) -> None:
    """Only these files, and 8 GB that are free, are in /proc and /sys; neither exists where they are None."""
    files = files and {"/proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:    {8 * GB // 1024} kB\n"} | files
    original = Path.read_text

    def read_text(path, *arguments):
        if not str(path).startswith(("/proc", "/sys")):
            return original(path, *arguments)
        if files is None or str(path) not in files:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return files[str(path)]

    patch.setattr(Path, "read_text", read_text)


@pytest.mark.parametrize("system, free", MEMORY.values(), ids=MEMORY)
def test_free_memory_is_the_least_of_system_and_groups(monkeypatch, system, free):
    fake_system(monkeypatch, system)
    assert free_memory() == pytest.approx(free, rel=1e-6)


def test_free_memory_where_it_cannot_be_known(monkeypatch):
    fake_system(monkeypatch, None)
    assert free_memory() == math.inf


def test_a_buffer_that_memory_does_not_hold_is_refused_before_it_is_taken(args, capsys, monkeypatch, tmp_path):
    fake_system(monkeypatch, MEMORY["v2, its parent's"][0])
    monkeypatch.setattr(dqn_softmoe, "ReplayBuffer", None)
    with pytest.raises(SystemExit) as stop:
        main(replace(args, env_id="ALE/Breakout-v5", buffer_size=200_000))
    line = error(capsys.readouterr().err)
    assert stop.value.code == 2 and "--buffer-size 200000" in line and "1.42 GB" in line and "1.00 GB" in line
    assert not (tmp_path / "run" / "config.json").exists()


# ---------------------------------------------------------------------------------------------- endless evaluation
class Endless(gym.Env):
    """Reward 1 for ever."""

    observation_space, action_space = gym.spaces.Box(0, 255, (12, 12), np.uint8), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros((12, 12), np.uint8), {}

    def step(self, action):
        return np.zeros((12, 12), np.uint8), 1.0, False, False, {}


gym.register("Endless-v0", entry_point=Endless)


def test_an_evaluation_without_end_is_cut_and_says_so(args, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(dqn_softmoe, "MAX_EPISODE_STEPS", 50)
    main(replace(args, env_id="Endless-v0", eval_episodes=3))
    (line,) = notes(capsys.readouterr().err)
    assert "3 games were cut after 50 steps" in line
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["returns"] == [50.0] * 3


# ------------------------------------------------------------------------------------------------ poorer systems
def poor_system() -> None:
    """No cores to ask for, no signals but two, no locks, no /proc: as on macOS and Windows."""
    for owner, name in ((os, "sched_getaffinity"), (signal, "SIGUSR1"), (signal, "SIGHUP")):
        delattr(owner, name)
    fake_system(pytest.MonkeyPatch(), None)
    no_fcntl()


def test_a_run_on_a_poorer_system(child, args):
    code, out, err = child(poor_system)
    assert code == 0 and "600 agent steps done" in out and len(notes(err)) == 1
    code, _, err = child(poor_system, env_id="BreakoutNoFrameskip-v4", total_timesteps=80, resume=None)
    assert code == 0, err


def test_help_in_ascii_and_without_docstrings(tmp_path):
    line = [sys.executable, "-OO", *COMMAND[1:], "--help"]
    env = environment(LC_ALL="C", PYTHONIOENCODING="ascii", COLUMNS="100")
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stderr == b"" and b"--weights-every" in done.stdout


# ----------------------------------------------------------------------------------------------- runs of no use
def test_resuming_a_run_that_cannot_be_written(args, child, tmp_path):
    main(args)
    before, run = files(tmp_path), tmp_path / "run"
    tmp_path.chmod(0o755)
    run.chmod(0o555)
    for path in run.iterdir():
        path.chmod(0o444)

    def patch():
        os.chdir(tmp_path)
        if os.getuid() == 0:  # may write anywhere
            os.setuid(65534)

    code, _, err = child(patch, resume="run", total_timesteps=800)
    run.chmod(0o755)
    assert code == 2 and "PermissionError" in error(err) and files(tmp_path) == before


def test_resuming_a_run_that_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["dqn_softmoe.py", "--resume", str(tmp_path / "no such run")])
    with pytest.raises(SystemExit) as stop, dqn_softmoe.one_line_errors(Exception):
        main(dqn_softmoe.parse_args())
    assert stop.value.code == 2 and "no such run" in error(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script, other", [(dqn_softmoe, rainbow_softmoe), (rainbow_softmoe, dqn_softmoe)])
def test_resuming_another_script_s_run(script, other, monkeypatch, capsys, tmp_path):
    other.main(other.Args(**quick(runs_dir=str(tmp_path), run_name="run", total_timesteps=300)))
    before = files(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", "--resume", str(tmp_path / "run")])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, script.one_line_errors(Exception):
        script.main(script.parse_args())
    assert stop.value.code == 2 and error(capsys.readouterr().err) and files(tmp_path) == before
