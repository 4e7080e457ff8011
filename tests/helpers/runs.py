"""Where things are, small arguments for quick runs, what a run left behind, waiting, child processes."""

import csv
import gc
import itertools
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

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
HELPERS = Path(__file__).parent  # on the path of a process that plays the pixel game
GOLDEN = ROOT.parent / "shared" / "golden"
AGENTS = ["dqn_softmoe", "rainbow_softmoe", "der_softmoe"]


def quick(**overrides) -> dict:
    """Arguments of a run on the pixel game that takes about a second."""
    small = {"env_id": "pixel_game:PixelCatch-v0", "encoder": "nature", "num_experts": 2, "expert_hidden_dim": 16}
    small |= {"total_timesteps": 600, "learning_starts": 200, "buffer_size": 1000, "target_network_frequency": 100}
    small |= {"iteration_steps": 200, "eval_episodes": 2, "cuda": False}
    return small | overrides


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def only_run(runs_dir: Path) -> Path:
    (run_dir,) = Path(runs_dir).iterdir()
    return run_dir


def files(folder: Path) -> dict[str, bytes]:
    """All but the empty file that a run locks."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def outcome(run_dir: Path) -> dict:
    """All that a finished run's future depends on, and its records, but for the columns of speeds."""
    paths = (run_dir / name for name in ("episodes.csv", "eval.json"))  # offline there are none
    records = {path.name: path.read_text() for path in paths if path.exists()}
    scores = [{key: row[key] for key in row if key not in ("sps", "ups")} for row in read_csv(run_dir / "metrics.csv")]
    weights, state = torch.load(run_dir / "weights.pt", weights_only=True), checkpoint(run_dir)
    del state["progress"]["rows"]  # those of the files, with their speeds
    return state | records | {"scores": scores, "weights": weights}


def same(a, b) -> bool:
    """Equal to the bit, through dicts and lists."""
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
    """The lines of a terminal that are no progress bars, nor the emulator's own."""
    lines = [line for line in re.split(r"[\r\n]", text) if line.strip() and "%|" not in line]
    return [line for line in lines if not line.startswith(("A.L.E: ", "[Powered by Stella]"))]


def wait_for(condition, what: str, seconds: float = 300) -> None:
    """The limit is for what hangs: far above what a slow and busy machine takes."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)


class Child:
    """A call in a fork of this process, as if it were a script of its own: it can be killed, and has an exit code."""

    number = itertools.count()

    def __init__(self, folder: Path, function, *arguments):
        number = next(Child.number)
        self.paths = [folder / f"{name}{number}.txt" for name in ("stdout", "stderr")]
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self.call(function, *arguments))

    def call(self, function, *arguments) -> int:
        gc.freeze()  # what the parent left cannot be taken apart here: its threads are not
        tqdm.set_lock(threading.RLock())  # its own is shared with the parent, and a killed child may hold it
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python sets it; parsing that failed leaves it otherwise
        for number in (signal.SIGINT, signal.SIGHUP):  # which a shell in the background or nohup ignores
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
        """Exit code, or minus the signal that ended it; stdout; stderr."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return code, *(path.read_text() for path in self.paths)


def run_script(script: Path, *words) -> None:
    """As `python script.py words` does."""
    sys.argv = [str(script), *map(str, words)]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def fork_script(script: Path, *words, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a script in a fork, which has no need to import torch again."""

    def run():
        os.chdir(cwd)
        run_script(script, *words)

    with tempfile.TemporaryDirectory() as folder:
        return subprocess.CompletedProcess([script, *words], *Child(Path(folder), run).wait())


def at_call(owner, name: str, numbers, act) -> None:
    """Call `act` before these calls of `owner.name`, counted from 1; within a child, for nothing puts it back."""
    original, calls = getattr(owner, name), [0]

    def counted(*arguments, **keywords):
        calls[0] += 1
        if calls[0] in numbers:
            act()
        return original(*arguments, **keywords)

    setattr(owner, name, counted)
