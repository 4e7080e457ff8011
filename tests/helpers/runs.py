"""Paths, arguments of quick runs, segments, readers of run directories, waiting, and child processes."""

import csv
import gc
import itertools
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
HELPERS = Path(__file__).parent  # must be on the Python path of a process that plays the pixel game
GOLDEN = ROOT.parent / "shared" / "golden"
AGENTS = ["dqn_softmoe", "rainbow_softmoe", "der_softmoe"]


def quick(**overrides) -> dict:
    """Return the arguments of a run on the pixel game that takes about a second."""
    small = {"env_id": "pixel_game:PixelCatch-v0", "encoder": "nature", "num_experts": 2, "expert_hidden_dim": 16}
    small |= {"total_timesteps": 600, "learning_starts": 200, "buffer_size": 1000, "target_network_frequency": 100}
    small |= {"iteration_steps": 200, "eval_episodes": 2, "cuda": False}
    return small | overrides


SHAPE = (2, 10)  # environments and rows of a segment
FIRST, SECOND = "000000000000.npz", "000000000020.npz"


def write_segments(folder: Path, names=(FIRST, SECOND), env_id: str = quick()["env_id"], **changes) -> None:
    """Write valid segments, except that the last one has the arrays in `changes`."""
    folder.mkdir()
    metadata = {"env_id": env_id, "num_actions": 3, "num_envs": 2, "ale_py": None, "rom_md5": None, "args": {}}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    good = {"frames": np.ones((*SHAPE, 12, 12), np.uint8), "action": np.ones(SHAPE, np.int64)}
    good["reward"] = np.ones(SHAPE, np.float32)
    good |= {name: np.zeros(SHAPE, bool) for name in ("terminated", "truncated")}
    for name in names:
        np.savez_compressed(folder / name, **good | (changes if name == names[-1] else {}))


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def only_run(runs_dir: Path) -> Path:
    (run_dir,) = Path(runs_dir).iterdir()
    return run_dir


def files(folder: Path) -> dict[str, bytes]:
    """Map each file's path to its content. The empty file that a run locks is left out."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def scalars(run_dir: Path) -> dict[str, list[int]]:
    """Map each TensorBoard tag to the steps at which it was logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def outcome(run_dir: Path) -> dict:
    """Return the checkpoint, the weights and the records of a finished run, without the columns of speeds."""
    paths = (run_dir / name for name in ("episodes.csv", "eval.json"))  # offline runs have none
    records = {path.name: path.read_text() for path in paths if path.exists()}
    scores = [{key: row[key] for key in row if key not in ("sps", "ups")} for row in read_csv(run_dir / "metrics.csv")]
    weights, state = torch.load(run_dir / "weights.pt", weights_only=True), checkpoint(run_dir)
    del state["progress"]["rows"]  # the rows of the records, with the speeds
    return state | records | {"scores": scores, "weights": weights}


def same(a, b) -> bool:
    """Return whether two values are equal to the bit. They may be nested dicts and lists of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_same_outcome(a: Path, b: Path) -> None:
    a, b = outcome(a), outcome(b)
    assert [part for part in a if not same(a[part], b.get(part))] == [] and a.keys() == b.keys()


def notes(text: str) -> list[str]:
    """Return the lines of console output that are neither progress bars nor messages of the Atari emulator."""
    lines = [line for line in re.split(r"[\r\n]", text) if line.strip() and "%|" not in line]
    return [line for line in lines if not line.startswith(("A.L.E: ", "[Powered by Stella]"))]


def wait_for(condition, what: str, seconds: float = 300) -> None:
    """Wait until the condition holds. The time limit is far above what a busy machine needs: it only ends a hang."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)


class Killed(BaseException):
    """Stands for SIGKILL within this process: the scripts do not catch it."""


def die(*_) -> None:
    raise Killed


class Exploit:
    """Raises SystemError when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemError('unpickled')",)


class Child:
    """Calls a function in a fork of this process. Like a script, the fork can be killed and has an exit code."""

    number = itertools.count()

    def __init__(self, folder: Path, function, *arguments):
        number = next(Child.number)
        self.paths = [folder / f"{name}{number}.txt" for name in ("stdout", "stderr")]
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self.call(function, *arguments))

    def call(self, function, *arguments) -> int:
        gc.freeze()  # do not finalise objects of the parent, whose threads do not exist here
        tqdm.set_lock(threading.RLock())  # tqdm's own lock is shared with the parent, and a killed child may hold it
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # Python's default, which parse_args changes if it fails
        for number in (signal.SIGINT, signal.SIGHUP):  # nohup and background shells ignore them
            signal.signal(number, signal.SIG_DFL)
        for number, path in enumerate(self.paths, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        try:
            function(*arguments)
        except SystemExit as stop:
            return stop.code or 0
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

    def wait(self) -> tuple[int, str, str]:
        """Return the exit code, stdout and stderr. The code of a child that a signal ended is minus that signal."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return code, *(path.read_text() for path in self.paths)


def run_script(script: Path, *words) -> None:
    """Run a script as `python script.py words` does."""
    sys.argv = [str(script), *map(str, words)]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def fork_script(script: Path, *words, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a script in a fork, which does not need to import torch again."""

    def run():
        os.chdir(cwd)
        run_script(script, *words)

    with tempfile.TemporaryDirectory() as folder:
        return subprocess.CompletedProcess([script, *words], *Child(Path(folder), run).wait())


def at_call(owner, name: str, numbers, act) -> None:
    """Call `act` before the calls `numbers` of `owner.name`, counted from 1. The patch stays, so use it in a child."""
    original, calls = getattr(owner, name), [0]

    def counted(*arguments, **keywords):
        calls[0] += 1
        if calls[0] in numbers:
            act()
        return original(*arguments, **keywords)

    setattr(owner, name, counted)
