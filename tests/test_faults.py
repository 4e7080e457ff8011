"""Tests of faults around a run: other processes, failed writes, bugs, missing memory, systems without Linux features.

After every fault the last good checkpoint is intact, and each file is either whole or absent. An external fault is
reported in one line, and a bug with its traceback. Exit codes: 0: the run is finished. 1: the last checkpoint could not
be written. 2: an error. 70: a bug. 75: a signal stopped the run.
"""

import errno
import gc
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from runs import (
    ROOT,
    Child,
    assert_same_outcome,
    at_call,
    checkpoint,
    files,
    notes,
    quick,
    read_csv,
    run_script,
    wait_for,
    write_segments,
)

import dqn_softmoe
from dqn_softmoe import Args, free_memory, main

DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def args(tmp_path) -> Args:
    """Args of a run in tmp_path / "run"."""
    return Args(**quick(runs_dir=str(tmp_path), run_name="run", resume="auto"))


@pytest.fixture
def run_in_child(tmp_path_factory, args):
    """Return a function that calls `patch()`, then `main`, in a child process. It returns exit code, stdout, stderr."""

    def call(patch=lambda: None, **overrides) -> tuple[int, str, str]:
        def run():
            dqn_softmoe.LOG_EVERY = 90
            patch()
            main(replace(args, **overrides))

        return Child(tmp_path_factory.mktemp("child"), run).wait()

    return call


def only_error(text: str) -> str:
    """Return the only line of `text`, which must report an error."""
    (line,) = notes(text)
    assert line.startswith("error: ")
    return line


def raise_at(owner, name: str, calls, exception: Exception) -> None:
    """Make these calls of `owner.name`, counted from 1, raise. Only for child processes: nothing undoes the patch."""

    def fail():
        raise exception

    at_call(owner, name, calls, fail)


def assert_resumes(args: Args, step: int | None) -> None:
    """Check that the run resumes from `step`, unless that is None, to its end, and that its records repeat no step."""
    run = Path(args.runs_dir) / "run"
    assert step in (None, checkpoint(run)["progress"]["global_step"])
    main(replace(args, total_timesteps=800))
    assert checkpoint(run)["progress"]["global_step"] == 800
    assert [int(row["global_step"]) for row in read_csv(run / "metrics.csv")] == [200, 400, 600, 800]
    assert sum(int(row["episodes"]) for row in read_csv(run / "metrics.csv")) == len(read_csv(run / "episodes.csv"))
    assert list(run.rglob("*.tmp")) == []


# -------------------------------------------------------------------------------------- other processes and files
def test_a_second_process_changes_nothing(args, run_in_child, tmp_path):
    reached, go_on = tmp_path.parent / "reached", tmp_path.parent / "go_on"

    def pause():
        reached.touch()
        wait_for(go_on.exists, "the others to be refused")

    def first():
        at_call(dqn_softmoe.Environments, "send", [101], pause)
        main(args)

    running = Child(tmp_path.parent, first)
    wait_for(reached.exists, "the middle of the run")
    config = (tmp_path / "run" / "config.json").read_bytes()
    for resume in ("auto", str(tmp_path / "run")):
        code, out, err = run_in_child(resume=resume)
        assert (code, out) == (2, "") and "in use by another process" in only_error(err)
    assert (tmp_path / "run" / "config.json").read_bytes() == config
    go_on.touch()
    assert running.wait()[0] == 0
    main(replace(args, resume=None, run_name="unbroken"))
    assert_same_outcome(tmp_path / "run", tmp_path / "unbroken")


def disable_locks() -> None:
    import fcntl

    raise_at(fcntl, "flock", [1], OSError(errno.ENOTSUP, "Operation not supported"))


def remove_fcntl() -> None:
    sys.modules["fcntl"] = None


@pytest.mark.parametrize("patch", [disable_locks, remove_fcntl])
def test_a_run_without_file_locks_warns(run_in_child, patch):
    code, _, err = run_in_child(patch)
    (line,) = notes(err)
    assert code == 0 and line.startswith("warning: nothing keeps a second process from")


def test_files_of_the_user_are_neither_read_nor_touched(args, tmp_path):
    run = tmp_path / "run"
    main(replace(args, total_timesteps=300, checkpoint_every=100))
    (run / "checkpoint-best").mkdir()
    names = "checkpoint-best/state.pt", "checkpoint-at400", "checkpoint.pt.bak", "checkpoint-9.pt", "notes.txt"
    for name in names:
        (run / name).write_text(name)
    before = {name: files(run)[name] for name in names}
    main(replace(args, checkpoint_every=100))
    main(replace(args, total_timesteps=800, checkpoint_every=100, checkpoint_at_end=False))
    assert {name: files(run)[name] for name in names} == before


# ------------------------------------------------------------------------------------------------- failed writes
def limit_file(name: str, size: int, calls=(1,)):
    """Return a patch that limits the size of the file `name` in these writes of it, counted from 1."""
    resource = pytest.importorskip("resource")

    def patch():
        original, count = dqn_softmoe.write_file, [0]
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        def write_file(path, write):
            count[0] += path.name == name
            if path.name == name and count[0] in calls:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))
            try:
                original(path, write)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))

        dqn_softmoe.write_file = write_file

    return patch


def assert_all_whole(run: Path) -> None:
    for path in run.rglob("*.json"):
        json.loads(path.read_text())
    for path in run.rglob("*.pt"):
        torch.load(path, weights_only=True)
    assert list(run.rglob("*.tmp")) == []


@pytest.mark.parametrize("calls, size, code, step", [([2], 20_000, 0, 600), ([2, 3], 400_000, 1, 200)])
def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(args, run_in_child, tmp_path, calls, size, code, step):
    """The write fails in the networks or in the replay. The run goes on, and exits with 1 if the last write failed."""
    found, out, err = run_in_child(limit_file("checkpoint.pt", size, calls), checkpoint_every=200)
    assert found == code and "600 agent steps done" in out
    for line, at in zip(notes(err), (400, 600)[: len(calls)], strict=True):
        assert line.startswith("warning: ") and f"step {at}" in line and "File too large" in line
    assert json.loads((tmp_path / "run" / "config.json").read_text())["finished"] == (0 if code else 600)
    assert_all_whole(tmp_path / "run")
    assert_resumes(replace(args, checkpoint_every=200), step)


OTHER_FILES = {  # patch, and the step from which the run resumes
    "weights": (limit_file("weights.pt", 20_000), 600),
    "weights in mid-run": (limit_file("500.pt", 20_000), 500),
    "evaluation": (limit_file("eval.json", 50), 600),
    "configuration at the end": (limit_file("config.json", 100, [2]), 600),
}


@pytest.mark.parametrize("patch, step", OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_that_does_not_fit(args, run_in_child, tmp_path, patch, step):
    code, _, err = run_in_child(patch, weights_every=500)
    assert code == 2 and "File too large" in only_error(err)
    assert_all_whole(tmp_path / "run")
    assert_resumes(args, step)


def test_a_configuration_that_does_not_fit(run_in_child, tmp_path):
    code, _, err = run_in_child(limit_file("config.json", 100))
    assert code == 2 and "File too large" in only_error(err) and files(tmp_path) == {}


def fail_tensorboard(name: str, calls):
    def patch():
        from tensorboard.summary.writer import record_writer

        raise_at(record_writer.RecordWriter, name, calls, DISK_FULL)
        threading.excepthook = lambda _: None  # TensorBoard's writer thread raises the error, too

    return patch


RECORDS = {  # patch, and the step from which the run resumes
    "a row of a CSV file": (lambda: raise_at(dqn_softmoe.RunLog, "round", [20], DISK_FULL), 80),
    "TensorBoard": (fail_tensorboard("write", range(20, 10**6)), None),
    "TensorBoard, at a checkpoint": (fail_tensorboard("flush", range(2, 10**6)), 400),
}


@pytest.mark.parametrize("patch, step", RECORDS.values(), ids=RECORDS)
def test_a_record_that_does_not_fit_ends_the_run(args, run_in_child, patch, step):
    """No checkpoint is lost."""
    code, _, err = run_in_child(patch, checkpoint_every=400)
    assert code == 2 and "No space left" in only_error(err)
    assert_resumes(args, step)


def test_closed_pipes_stop_the_run(args, run_in_child):
    """As in `2>&1 | head`, nobody reads the output any more. The run saves its progress."""

    def patch():
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        dqn_softmoe.BAR["mininterval"] = 0.0
        at_call(dqn_softmoe.Environments, "send", [101], lambda: os.close(reader))

    assert run_in_child(patch)[0] == 2
    assert_resumes(args, 404)


# --------------------------------------------------------------------------------------------- bugs and out of memory
SCRIPTS = ["dqn_softmoe", "rainbow_softmoe", "cql_softmoe"]


@pytest.fixture(params=SCRIPTS)
def script(request) -> str:
    return request.param


@pytest.fixture
def command_line(script, tmp_path) -> list[str]:
    """The command line of a run of the script in tmp_path / "run", with a checkpoint in its middle."""
    words = f"{script}.py --env-id pixel_game:PixelCatch-v0 --no-cuda --encoder nature --num-experts 2 --run-name run"
    words += f" --expert-hidden-dim 4 --batch-size 4 --runs-dir {tmp_path} --num-envs 2 --resume auto"
    if script == "cql_softmoe":
        write_segments(tmp_path / "data")
        words += f" --dataset-dir {tmp_path / 'data'} --total-updates 8 --checkpoint-every 4 --eval-steps 20"
    else:
        words += " --total-timesteps 120 --learning-starts 40 --checkpoint-every 60 --replay-ratio 0.1"
        words += " --buffer-size 100 --eval-episodes 1"
    return words.split()


@pytest.fixture
def script_and_args(script, command_line, monkeypatch):
    """The script as a module, and the parsed arguments. TensorBoard gets a point every 2 steps or updates."""
    monkeypatch.setattr(sys, "argv", command_line)
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "LOG_EVERY", 2)
    return module, module.parse_args()


def fail_after_checkpoint(patch: pytest.MonkeyPatch, run: Path, owner, name: str, error: Exception) -> list[bytes]:
    """Make the first call of `owner.name` after a checkpoint raise. Returns a list that gets the checkpoint's bytes."""
    original, contents = getattr(owner, name), []

    def fail(*arguments, **keywords):
        if not (run / "checkpoint.pt").exists() or contents:
            return original(*arguments, **keywords)
        contents.append((run / "checkpoint.pt").read_bytes())
        raise error

    patch.setattr(owner, name, fail)
    return contents


MEMORY_ERRORS = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")]
MEMORY_ERRORS += [RuntimeError("could not create a primitive")]


@pytest.mark.parametrize("script, number", [*((name, 0) for name in SCRIPTS), ("dqn_softmoe", 1), ("dqn_softmoe", 2)])
def test_out_of_memory_in_training_is_one_line(script_and_args, tmp_path, number, monkeypatch, capsys):
    """The last checkpoint is kept, because the state in memory may be that of half an update."""
    (script, args), run, error = script_and_args, tmp_path / "run", MEMORY_ERRORS[number]
    contents = fail_after_checkpoint(monkeypatch, run, script.Agent, "update", error)
    with pytest.raises(SystemExit) as stop:
        script.main(args)
    (found,) = notes(capsys.readouterr().err)
    assert stop.value.code == 2 and found.strip() == f"error: out of memory. {error}".strip()
    assert contents == [(run / "checkpoint.pt").read_bytes()]


BUGS = [("Agent", "update"), ("Environments", "recv"), ("RunLog", "scalars")]


@pytest.mark.parametrize("owner, method", BUGS)
def test_a_bug_keeps_its_traceback_and_the_checkpoint(script_and_args, tmp_path, owner, method, monkeypatch):
    (script, args), run, bug = script_and_args, tmp_path / "run", RuntimeError("CUDA error: an illegal memory access")
    contents = fail_after_checkpoint(monkeypatch, run, getattr(script, owner), method, bug)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        script.main(args)
    assert contents == [(run / "checkpoint.pt").read_bytes()]


@pytest.mark.parametrize("error", [DISK_FULL, BrokenPipeError(errno.EPIPE, "Broken pipe")], ids=["disk", "pipe"])
def test_a_log_that_cannot_be_written_loses_no_round(script_and_args, tmp_path, error, monkeypatch, capsys):
    (script, args), run = script_and_args, tmp_path / "run"
    contents = fail_after_checkpoint(monkeypatch, run, script.RunLog, "scalars", error)
    with pytest.raises(SystemExit) as stop:
        script.main(args)
    (found,) = notes(capsys.readouterr().err)
    assert stop.value.code == 2 and found == f"error: {type(error).__name__}: {error}" and len(contents) == 1
    progress = checkpoint(run)["progress"]
    assert progress.get("update", progress.get("global_step")) == (6 if "update" in progress else 62)
    error.__traceback__ = None  # the traceback holds the lock
    del stop
    gc.collect()
    script.main(args)
    assert json.loads((run / "config.json").read_text())["finished"] in (8, 120)


def fail_adam(method: str, call: int, error: Exception):
    return lambda: raise_at(torch.optim.Adam, method, [call], error)


def fail_last_checkpoint() -> None:
    raise_at(torch, "save", [2], DISK_FULL)  # the second checkpoint is the last


EXITS = {  # patch, exit code, text on stderr
    "a bug": (fail_adam("step", 3, ZeroDivisionError("a bug")), 70, "ZeroDivisionError: a bug"),
    "a bug in the set-up": (fail_adam("__init__", 1, TypeError("a bug")), 70, "TypeError: a bug"),
    "the last checkpoint": (fail_last_checkpoint, 1, "warning: the last good checkpoint stays"),
}


@pytest.mark.parametrize("script", ["dqn_softmoe", "cql_softmoe"])
@pytest.mark.parametrize("patch, code, text", EXITS.values(), ids=EXITS)
def test_exit_codes(command_line, tmp_path_factory, patch, code, text):
    def run():
        patch()
        run_script(ROOT / command_line[0], *command_line[1:])

    found, _, err = Child(tmp_path_factory.mktemp("child"), run).wait()
    assert found == code and text in err and ("Traceback" in err) == (code == 70), err


def test_a_bug_while_saving_keeps_its_traceback(args, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: device-side assert triggered")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="device-side assert"):
        patch.setattr(torch, "save", fail)
        main(args)
    assert not (tmp_path / "run" / "checkpoint.pt").exists() and not list(tmp_path.rglob("*.tmp"))


def poison_loss(good: int) -> None:
    """Make `td_loss` return NaN after this many good updates."""
    original, count = dqn_softmoe.td_loss, [0]

    def td_loss(*arguments):
        loss, metrics, output = original(*arguments)
        count[0] += 1
        factor = 1.0 if count[0] <= good else math.nan
        return loss * factor, {name: value * factor for name, value in metrics.items()}, output

    dqn_softmoe.td_loss = td_loss


@pytest.mark.parametrize("log_every, words", [(100, "agent step 500"), (10_000, "a weight is not finite")])
def test_a_loss_that_is_not_finite_reaches_no_checkpoint(args, run_in_child, tmp_path, log_every, words):
    """The loss is NaN from step 444 on. The log or the next checkpoint notices it, and the one of step 400 stays."""

    def patch():
        dqn_softmoe.LOG_EVERY = log_every
        poison_loss(60)

    code, _, err = run_in_child(patch, checkpoint_every=200)
    assert code == 2 and words in only_error(err) and str(tmp_path / "run" / "checkpoint.pt") in err
    assert all(weight.isfinite().all() for weight in checkpoint(tmp_path / "run")["q_network"].values())
    assert not (tmp_path / "run" / "weights.pt").exists()
    assert_resumes(replace(args, checkpoint_every=200), 400)


# -------------------------------------------------------------------------------------------------------- memory
GB = 10**9


def cgroup(path: str, limit: object, used: int) -> dict[str, str]:
    """Return the limit and usage files of a cgroup of version 1, if the path begins with "memory", or 2."""
    v1 = path.startswith("memory")
    names = ("memory.limit_in_bytes", "total_rss") if v1 else ("memory.max", "anon")
    return {
        f"/sys/fs/cgroup/{path}/{names[0]}": f"{limit}\n",
        f"/sys/fs/cgroup/{path}/memory.stat": f"{'rss' if v1 else 'file'} {9 * GB}\n{names[1]} {used}\n",
    }


V1 = {"/proc/self/cgroup": "9:cpu,cpuacct:/slurm/job\n4:memory:/slurm/job\n0::/other\n"}
V2 = {"/proc/self/cgroup": "0::/a/b\n"}
MEMORY = {  # files of the system, free bytes
    "no limit": (V2, 8 * GB),
    "v2, own limit": (V2 | cgroup("a/b", 5 * GB, GB), 4 * GB),
    "v2, parent's limit": (V2 | cgroup("a/b", "max", GB) | cgroup("a", 3 * GB, 2 * GB), GB),
    "v2, the system has less": (V2 | cgroup("a", 50 * GB, 0), 8 * GB),
    "v1, job": (V1 | cgroup("memory/slurm/job", 2**63 - 4096, GB) | cgroup("memory/slurm", 6 * GB, 4 * GB), 2 * GB),
    "v1, container with another root": (V1 | cgroup("memory", 2 * GB, GB // 2), 2 * GB - GB // 2),
    "no such files": (None, math.inf),
}


def fake_system(patch: pytest.MonkeyPatch, files: dict[str, str] | None) -> None:
    """Make /proc and /sys hold only `files` and 8 GB of available memory, or nothing if `files` is None."""
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
def test_free_memory_is_the_minimum_over_system_and_cgroups(monkeypatch, system, free):
    fake_system(monkeypatch, system)
    assert free_memory() == pytest.approx(free, rel=1e-6)


def test_a_buffer_larger_than_memory_is_refused_before_it_is_allocated(args, capsys, monkeypatch, tmp_path):
    fake_system(monkeypatch, MEMORY["v2, parent's limit"][0])
    monkeypatch.setattr(dqn_softmoe, "ReplayBuffer", None)
    with pytest.raises(SystemExit) as stop:
        main(replace(args, env_id="ALE/Breakout-v5", buffer_size=200_000, total_timesteps=200_000))
    error = only_error(capsys.readouterr().err)
    assert stop.value.code == 2 and "--buffer-size 200000" in error and "1.42 GB" in error and "1.00 GB" in error
    assert not (tmp_path / "run" / "config.json").exists()


# ---------------------------------------------------------------------------------------------- endless evaluation
class Endless(gym.Env):
    """A game that never ends and gives a reward of 1 at every step."""

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


# ------------------------------------------------------------------------------------ systems without Linux features
def remove_linux_features() -> None:
    """Remove what macOS or Windows lacks: CPU affinity, SIGUSR1, SIGHUP, file locks, /proc and /sys."""
    for owner, name in ((os, "sched_getaffinity"), (signal, "SIGUSR1"), (signal, "SIGHUP")):
        delattr(owner, name)
    fake_system(pytest.MonkeyPatch(), None)
    remove_fcntl()


def test_a_run_without_linux_features(run_in_child, args):
    code, out, err = run_in_child(remove_linux_features)
    assert code == 0 and "600 agent steps done" in out and len(notes(err)) == 1
    code, _, err = run_in_child(remove_linux_features, env_id="BreakoutNoFrameskip-v4", total_timesteps=80, resume=None)
    assert code == 0, err


def test_help_in_ascii_and_without_docstrings(tmp_path):
    line = [sys.executable, "-OO", str(ROOT / "dqn_softmoe.py"), "--help"]
    env = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "100"}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, timeout=600)
    assert done.returncode == 0 and done.stderr == b"" and b"--weights-every" in done.stdout


# ------------------------------------------------------------------------------------- runs that cannot be resumed
def test_resuming_a_run_that_cannot_be_written(args, run_in_child, tmp_path):
    main(args)
    before, run = files(tmp_path), tmp_path / "run"
    tmp_path.chmod(0o755)
    run.chmod(0o555)
    for path in run.iterdir():
        path.chmod(0o444)

    def patch():
        os.chdir(tmp_path)
        if os.getuid() == 0:  # root may write anywhere
            os.setuid(65534)

    code, _, err = run_in_child(patch, resume="run", total_timesteps=800)
    run.chmod(0o755)
    assert code == 2 and "PermissionError" in only_error(err) and files(tmp_path) == before
