"""What goes wrong around a run: other processes and files, full disks, broken pipes, crashes, memory, poor systems.

Whatever it is, the last good checkpoint stays, files are whole or absent, and the run says what happened: on one line
where the fault lies outside, with a traceback where it is a bug. Exit codes: 0 finished, 75 stopped by a signal, 2 for
an error, 1 where the last checkpoint could not be written, 70 for a bug.
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
    AGENTS,
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
)

import dqn_softmoe
import rainbow_softmoe
from dqn_softmoe import Args, free_memory, main

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def args(tmp_path) -> Args:
    """Args of a run in tmp_path / "run"."""
    return Args(**quick(runs_dir=str(tmp_path), run_name="run", resume="auto"))


@pytest.fixture
def child(tmp_path_factory, args):
    """Calls `patch()` and then the run in a process of its own; returns exit code, stdout, stderr."""

    def call(patch=lambda: None, **overrides) -> tuple[int, str, str]:
        def run():
            dqn_softmoe.LOG_EVERY = 90
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

    def fail():
        raise exception

    at_call(owner, name, calls, fail)


def resumes(args: Args, step: int | None) -> None:
    """The run goes on from this step to its end, and its records know of no step twice."""
    run = Path(args.runs_dir) / "run"
    assert step in (None, checkpoint(run)["progress"]["global_step"])
    main(replace(args, total_timesteps=800))
    assert checkpoint(run)["progress"]["global_step"] == 800
    assert [int(row["global_step"]) for row in read_csv(run / "metrics.csv")] == [200, 400, 600, 800]
    assert sum(int(row["episodes"]) for row in read_csv(run / "metrics.csv")) == len(read_csv(run / "episodes.csv"))
    assert list(run.rglob("*.tmp")) == []


# -------------------------------------------------------------------------------------- other processes and files
def test_a_second_process_changes_nothing(args, child, tmp_path):
    reached, go_on = tmp_path.parent / "reached", tmp_path.parent / "go_on"

    def pause():
        reached.touch()
        wait_for(go_on.exists, "the others to be refused")

    def first():
        at_call(dqn_softmoe.Environments, "send", [101], pause)
        main(args)

    running = Child(tmp_path.parent, first)
    wait_for(reached.exists, "a run in its middle")
    config = (tmp_path / "run" / "config.json").read_bytes()
    for resume in ("auto", str(tmp_path / "run")):
        code, out, err = child(resume=resume)
        assert (code, out) == (2, "") and "in use by another process" in error(err)
    assert (tmp_path / "run" / "config.json").read_bytes() == config
    go_on.touch()
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
def limited(name: str, size: int, calls=(1,)):
    """The operating system ends the file at that size, these times that it is written."""
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


def all_whole(run: Path) -> None:
    for path in run.rglob("*.json"):
        json.loads(path.read_text())
    for path in run.rglob("*.pt"):
        torch.load(path, weights_only=True)
    assert list(run.rglob("*.tmp")) == []


@pytest.mark.parametrize("calls, size, code, step", [([2], 20_000, 0, 600), ([2, 3], 400_000, 1, 200)])
def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(args, child, tmp_path, calls, size, code, step):
    """Which goes wrong in the networks or in the replay; the run goes on, and says in the end if it was the last."""
    found, out, err = child(limited("checkpoint.pt", size, calls), checkpoint_every=200)
    assert found == code and "600 agent steps done" in out
    for line, at in zip(notes(err), (400, 600)[: len(calls)], strict=True):
        assert line.startswith("warning: ") and f"step {at}" in line and "File too large" in line
    assert json.loads((tmp_path / "run" / "config.json").read_text())["finished"] == (0 if code else 600)
    all_whole(tmp_path / "run")
    resumes(replace(args, checkpoint_every=200), step)


OTHER_FILES = {  # what fails -> the step that the run goes on from
    "weights": (limited("weights.pt", 20_000), 600),
    "weights in mid-run": (limited("500.pt", 20_000), 500),
    "evaluation": (limited("eval.json", 50), 600),
    "configuration at the end": (limited("config.json", 100, [2]), 600),
}


@pytest.mark.parametrize("patch, step", OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_that_does_not_fit(args, child, tmp_path, patch, step):
    code, _, err = child(patch, weights_every=500)
    assert code == 2 and "File too large" in error(err)
    all_whole(tmp_path / "run")
    resumes(args, step)


def test_a_configuration_that_does_not_fit(child, tmp_path):
    code, _, err = child(limited("config.json", 100))
    assert code == 2 and "File too large" in error(err) and files(tmp_path) == {}


def full_tensorboard(name: str, calls):
    def patch():
        from tensorboard.summary.writer import record_writer

        fails(record_writer.RecordWriter, name, calls, FULL)
        threading.excepthook = lambda _: None  # TensorBoard's own thread dies of it

    return patch


RECORDS = {  # what fails -> the step that the run goes on from
    "a row": (lambda: fails(dqn_softmoe.RunLog, "round", [20], FULL), 80),
    "curves": (full_tensorboard("write", range(20, 10**6)), None),
    "curves, as a checkpoint is written": (full_tensorboard("flush", range(2, 10**6)), 400),
}


@pytest.mark.parametrize("patch, step", RECORDS.values(), ids=RECORDS)
def test_records_that_do_not_fit(args, child, patch, step):
    """They end the run, but cost no checkpoint."""
    code, _, err = child(patch, checkpoint_every=400)
    assert code == 2 and "No space left" in error(err)
    resumes(args, step)


def test_nobody_reads_any_more(args, child):
    """Like `2>&1 | head`: the run stops, but saves what it has done."""

    def patch():
        readers, writer = os.pipe()
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        dqn_softmoe.BAR["mininterval"] = 0.0
        at_call(dqn_softmoe.Environments, "send", [101], lambda: os.close(readers))

    assert child(patch)[0] == 2
    resumes(args, 404)


# --------------------------------------------------------------------------------------------- bugs, not faults; memory
SCRIPTS = [*AGENTS, "cql_softmoe"]


@pytest.fixture(params=SCRIPTS)
def name(request) -> str:
    return request.param


@pytest.fixture
def line(name, tmp_path) -> list[str]:
    """The command line of a run in tmp_path / "run", of any script, with a checkpoint in its middle."""
    words = f"{name}.py --env-id pixel_game:PixelCatch-v0 --no-cuda --encoder nature --num-experts 2 --run-name run"
    words += f" --expert-hidden-dim 4 --batch-size 4 --runs-dir {tmp_path} --num-envs 2 --resume auto"
    if name == "cql_softmoe":
        arrays = {"frames": np.ones((1, 9, 12, 12), np.uint8), "action": np.ones((1, 9), np.int64)}
        arrays |= {"reward": np.ones((1, 9), np.float32)}
        (tmp_path / "data").mkdir()
        ends = {end: np.zeros((1, 9), bool) for end in ("terminated", "truncated")}
        np.savez(tmp_path / "data" / "000000000000.npz", **arrays | ends)
        metadata = {"env_id": "pixel_game:PixelCatch-v0", "num_actions": 3, "num_envs": 1}
        (tmp_path / "data" / "metadata.json").write_text(json.dumps(metadata))
        words += f" --dataset-dir {tmp_path / 'data'} --total-updates 8 --checkpoint-every 4 --eval-steps 20"
    else:
        words += " --total-timesteps 120 --learning-starts 40 --checkpoint-every 60 --replay-ratio 0.1"
        words += " --buffer-size 100 --eval-episodes 1"
    return words.split()


@pytest.fixture
def started(name, line, monkeypatch):
    """The script as a module, and its arguments; points of the curves after 2 steps or updates."""
    monkeypatch.setattr(sys, "argv", line)
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "LOG_EVERY", 2)
    return script, script.parse_args()


def fail_after_checkpoint(patch: pytest.MonkeyPatch, run: Path, owner, name: str, error: Exception) -> list[bytes]:
    """Raise in the first call after there is a checkpoint; returns a list, later of its bytes."""
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


@pytest.mark.parametrize("name, number", [*((name, 0) for name in SCRIPTS), ("dqn_softmoe", 1), ("dqn_softmoe", 2)])
def test_memory_that_runs_out_while_training_is_one_line(started, tmp_path, number, monkeypatch, capsys):
    """The last checkpoint stays: what is in memory may be half of an update."""
    (script, args), run, error = started, tmp_path / "run", MEMORY_ERRORS[number]
    contents = fail_after_checkpoint(monkeypatch, run, script.Agent, "update", error)
    with pytest.raises(SystemExit) as stop:
        script.main(args)
    (found,) = notes(capsys.readouterr().err)
    assert stop.value.code == 2 and found.strip() == f"error: out of memory. {error}".strip()
    assert contents == [(run / "checkpoint.pt").read_bytes()]


BUGS = [("Agent", "update"), ("Environments", "recv"), ("RunLog", "scalars")]


@pytest.mark.parametrize("owner, method", BUGS)
def test_a_bug_keeps_its_traceback_and_leaves_the_checkpoint_alone(started, tmp_path, owner, method, monkeypatch):
    (script, args), run, bug = started, tmp_path / "run", RuntimeError("CUDA error: an illegal memory access")
    contents = fail_after_checkpoint(monkeypatch, run, getattr(script, owner), method, bug)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        script.main(args)
    assert contents == [(run / "checkpoint.pt").read_bytes()]


@pytest.mark.parametrize("error", [FULL, BrokenPipeError(errno.EPIPE, "Broken pipe")], ids=["full disk", "closed pipe"])
def test_a_log_that_cannot_be_written_costs_no_round(started, tmp_path, error, monkeypatch, capsys):
    (script, args), run = started, tmp_path / "run"
    contents = fail_after_checkpoint(monkeypatch, run, script.RunLog, "scalars", error)
    with pytest.raises(SystemExit) as stop:
        script.main(args)
    (found,) = notes(capsys.readouterr().err)
    assert stop.value.code == 2 and found == f"error: {type(error).__name__}: {error}" and len(contents) == 1
    progress = checkpoint(run)["progress"]
    assert progress.get("update", progress.get("global_step")) == (6 if "update" in progress else 62)
    error.__traceback__ = None  # which holds the lock
    del stop
    gc.collect()
    script.main(args)
    assert json.loads((run / "config.json").read_text())["finished"] in (8, 120)


def no_step(error: Exception, calls=(3,)):
    return lambda: fails(torch.optim.Adam, "step", calls, error)


def no_checkpoint() -> None:
    fails(torch, "save", [2], FULL)  # the second checkpoint, which is the last


EXITS = {  # patch, exit code, what stderr has
    "a bug": (no_step(ZeroDivisionError("a bug")), 70, "ZeroDivisionError: a bug"),
    "a bug in the set-up": (
        lambda: fails(torch.optim.Adam, "__init__", [1], TypeError("a bug")),
        70,
        "TypeError: a bug",
    ),
    "memory": (no_step(MemoryError()), 2, "error: out of memory."),
    "the last checkpoint": (no_checkpoint, 1, "warning: the last good checkpoint stays"),
    "a signal": (lambda: at_call(torch.optim.Adam, "step", [3], lambda: os.kill(os.getpid(), signal.SIGTERM)), 75, ""),
}


@pytest.mark.parametrize("name", ["dqn_softmoe", "cql_softmoe"])
@pytest.mark.parametrize("patch, code, text", EXITS.values(), ids=EXITS)
def test_exit_codes(line, tmp_path_factory, patch, code, text):
    def run():
        patch()
        run_script(ROOT / line[0], *line[1:])

    found, _, err = Child(tmp_path_factory.mktemp("child"), run).wait()
    assert found == code and text in err and ("Traceback" in err) == (code == 70), err


def test_a_bug_while_saving_is_no_full_disk(args, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: device-side assert triggered")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="device-side assert"):
        patch.setattr(torch, "save", fail)
        main(args)
    assert not (tmp_path / "run" / "checkpoint.pt").exists() and not list(tmp_path.rglob("*.tmp"))


def poisoned(good: int) -> None:
    """`td_loss` is NaN after this many good updates."""
    original, count = dqn_softmoe.td_loss, [0]

    def td_loss(*arguments):
        loss, metrics, output = original(*arguments)
        count[0] += 1
        factor = 1.0 if count[0] <= good else math.nan
        return loss * factor, {name: value * factor for name, value in metrics.items()}, output

    dqn_softmoe.td_loss = td_loss


@pytest.mark.parametrize("log_every, words", [(100, "agent step 500"), (10_000, "a weight is not finite")])
def test_a_loss_that_is_not_finite_reaches_no_checkpoint(args, child, tmp_path, log_every, words):
    """Updates after 200 steps, one in 4; seen in the records, or in the weights; the checkpoint of 400 stays."""

    def patch():
        dqn_softmoe.LOG_EVERY = log_every
        poisoned(60)

    code, _, err = child(patch, checkpoint_every=200)
    assert code == 2 and words in error(err) and str(tmp_path / "run" / "checkpoint.pt") in err
    assert all(weight.isfinite().all() for weight in checkpoint(tmp_path / "run")["q_network"].values())
    assert not (tmp_path / "run" / "weights.pt").exists()
    resumes(replace(args, checkpoint_every=200), 400)


# -------------------------------------------------------------------------------------------------------- memory
GB = 10**9


def group(path: str, limit: object, used: int) -> dict[str, str]:
    """The files of a group in either hierarchy."""
    v1 = path.startswith("memory")
    names = ("memory.limit_in_bytes", "total_rss") if v1 else ("memory.max", "anon")
    return {
        f"/sys/fs/cgroup/{path}/{names[0]}": f"{limit}\n",
        f"/sys/fs/cgroup/{path}/memory.stat": f"{'rss' if v1 else 'file'} {9 * GB}\n{names[1]} {used}\n",
    }


V1 = {"/proc/self/cgroup": "9:cpu,cpuacct:/slurm/job\n4:memory:/slurm/job\n0::/other\n"}
V2 = {"/proc/self/cgroup": "0::/a/b\n"}
MEMORY = {  # files of the system -> bytes that are free
    "no limit": (V2, 8 * GB),
    "v2, its own": (V2 | group("a/b", 5 * GB, GB), 4 * GB),
    "v2, its parent's": (V2 | group("a/b", "max", GB) | group("a", 3 * GB, 2 * GB), GB),
    "v2, the system has less": (V2 | group("a", 50 * GB, 0), 8 * GB),
    "v1, a job's": (V1 | group("memory/slurm/job", 2**63 - 4096, GB) | group("memory/slurm", 6 * GB, 4 * GB), 2 * GB),
    "v1, a container's, which sees another root": (V1 | group("memory", 2 * GB, GB // 2), 2 * GB - GB // 2),
    "no such files": (None, math.inf),
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


def test_a_buffer_that_memory_does_not_hold_is_refused_before_it_is_taken(args, capsys, monkeypatch, tmp_path):
    fake_system(monkeypatch, MEMORY["v2, its parent's"][0])
    monkeypatch.setattr(dqn_softmoe, "ReplayBuffer", None)
    with pytest.raises(SystemExit) as stop:
        main(replace(args, env_id="ALE/Breakout-v5", buffer_size=200_000, total_timesteps=200_000))
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
    line = [sys.executable, "-OO", str(ROOT / "dqn_softmoe.py"), "--help"]
    env = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "100"}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, timeout=600)
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


def refused_resume(script, run: Path, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", ["script.py", "--resume", str(run)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, script.one_line_errors(Exception):
        script.main(script.parse_args())
    assert stop.value.code == 2
    return error(capsys.readouterr().err)


def test_resuming_a_run_that_is_missing(monkeypatch, capsys, tmp_path):
    assert "no such run" in refused_resume(dqn_softmoe, tmp_path / "no such run", monkeypatch, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script, other", [(dqn_softmoe, rainbow_softmoe), (rainbow_softmoe, dqn_softmoe)])
def test_resuming_another_script_s_run(script, other, monkeypatch, capsys, tmp_path):
    other.main(other.Args(**quick(runs_dir=str(tmp_path), run_name="run", total_timesteps=300)))
    before = files(tmp_path)
    assert refused_resume(script, tmp_path / "run", monkeypatch, capsys) and files(tmp_path) == before
