"""Check whether a command will run on this machine, and estimate how long it will take.

    python scripts/doctor.py python dqn_softmoe.py --num-experts 8 --env-id BreakoutNoFrameskip-v4

Prints the versions, the device, the game with its ROM, and the memory and disk space that the command needs and that
are free. Then runs the command for 20 seconds, or up to a minute on a slow machine, to measure its speed. The exit
code is 1 if a check fails.
"""

import csv
import importlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import ale_py
import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
dqn_softmoe = importlib.import_module("dqn_softmoe")
WARM_UP = 12  # first rows of metrics.csv that `probe` leaves out: nothing is learned yet, or code is being compiled


def report(passed: bool | None, check: str, text: str) -> bool:
    """Print the outcome of a check and return False if it failed. None means that there was nothing to decide."""
    print(f"{ {True: 'ok', False: 'NO', None: '--'}[passed] }  {check:12} {text}", flush=True)
    return passed is not False


def check_device(script, args) -> bool:
    try:
        device = script.open_device(args)
    except ValueError as error:
        return report(False, "device", str(error))
    if device.type == "cpu":
        return report(None, "device", f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads")
    free, total = torch.cuda.mem_get_info()
    return report(True, "device", f"{torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free")


def check_game(script, args) -> bool:
    try:
        envs = script.Environments(args, 1)
    except Exception as error:
        return report(False, "game", f"{args.env_id}: {error}")
    rom = f"; ROM {Path(ale_py.roms.get_rom_path(envs.game)).name}" if envs.game else ""
    return report(True, "game", f"{args.env_id}, {envs.num_actions} actions, frames of {envs.frame_shape}{rom}")


def required_bytes(script, args) -> tuple[int, int]:
    """Return the bytes of the replay, or of the unpacked data of an offline run, and those of a weights file."""
    envs = script.Environments(args, 1)
    q_network = script.QNetwork(args, (script.STACK_SIZE, *envs.frame_shape), envs.num_actions)
    weights = sum(parameter.nbytes for parameter in q_network.parameters())
    if hasattr(args, "buffer_size"):
        replay = script.ReplayBuffer(args.buffer_size, args.num_envs, envs.frame_shape)  # takes no memory until filled
        return sum(buffer.nbytes for buffer in replay.buffers()), weights
    folders = args.dataset_dir, Path(args.dataset_dir, "replay")
    archives = (zipfile.ZipFile(path) for folder in folders for path in Path(folder).glob("[0-9]*.npz"))
    return sum(info.file_size for archive in archives for info in archive.infolist()), weights


def check_memory(script, args) -> bool:
    if not hasattr(args, "buffer_size"):
        need, _ = required_bytes(script, args)
        folder = args.dataset_dir or "no --dataset-dir"
        return report(need > 0, "data", f"{folder}, {need / 1e9:.1f} GB when unpacked, memory-mapped from the disk")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    try:
        place = script.replay_device(args, script.Environments(args, 1).frame_shape, device)
    except ValueError as error:
        return report(False, "memory", str(error))
    need, free = required_bytes(script, args)[0] / 1e9, script.free_memory() / 1e9
    return report(True, "memory", f"replay of {need:.1f} GB on the {place}; {free:.1f} GB of host memory are free")


def check_disk(script, args) -> bool:
    need, weights = required_bytes(script, args)
    folder = Path(args.runs_dir if hasattr(args, "buffer_size") else args.cache_dir or args.dataset_dir).absolute()
    folder = next(path for path in (folder, *folder.parents) if path.exists())
    length = getattr(args, "total_timesteps", None) or args.total_updates
    if hasattr(args, "buffer_size"):
        need *= 2 * min(1, length / args.buffer_size)  # a new checkpoint and the one that it replaces
        need += 100 * length * args.save_replay  # a compressed transition takes about 100 bytes
    need += weights * (length // args.weights_every if args.weights_every else 1)
    free = shutil.disk_usage(folder).free
    return report(need < free, "disk", f"up to {need / 1e9:.1f} GB in {folder}; {free / 1e9:.1f} GB are free")


def probe(script, args, seconds: float, at_most: float = 60) -> bool:
    """Run the script for `seconds`, or for up to `at_most` if it has not learned by then, and report its speed.

    Learning starts early and the replay is small, so that the run soon reaches its final speed.
    """
    if not hasattr(args, "total_timesteps"):
        return report(None, "speed", "not measured, because it depends on the data")
    with tempfile.TemporaryDirectory() as folder:
        steps = max(400, 2 * args.num_envs * (args.n_step + 2))
        settings = {"learning_starts": steps, "iteration_steps": steps // 10, "buffer_size": max(20_000, 2 * steps)}
        settings |= {"total_timesteps": 10**9, "checkpoint_every": 0, "weights_every": 0}
        settings |= {"runs_dir": folder, "run_name": "probe", "resume": None}
        code = f"import {script.__name__} as script; script.main(script.Args(**{vars(args) | settings}))"
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        child = subprocess.Popen([sys.executable, "-c", code], env=environment, **streams)
        path, rates, start = Path(folder, "probe", "metrics.csv"), [], time.monotonic()
        bar = tqdm(total=seconds, desc="speed", unit="s", leave=False, dynamic_ncols=True)
        while len(rates) < 60 and child.poll() is None:
            waited = time.monotonic() - start
            if waited > at_most or waited > seconds and len(rates) > WARM_UP:
                break
            time.sleep(0.5)
            bar.update(0.5)
            rates = [float(row["sps"]) for row in csv.DictReader(path.open())] if path.exists() else []
        bar.close()
        child.kill()
        error = child.communicate()[1].strip().splitlines()
    rates = rates[WARM_UP:]
    if child.returncode != -signal.SIGKILL:
        return report(False, "speed", error[-1] if error else f"exit code {child.returncode}")
    if not rates:
        return report(None, "speed", f"no number after {at_most:g} s: the machine is slow or busy with other work")
    rate = np.median(rates).item()
    hours = args.total_timesteps / rate / 3600
    return report(True, "speed", f"{rate:.0f} agent steps/s while learning: {hours:.1f} hours without the evaluation")


@dqn_softmoe.one_line_errors(Exception)
def main() -> int:
    command = sys.argv[1:]
    if command in ([], ["-h"], ["--help"]):
        print(__doc__, flush=True)
        return 0
    if "python" in Path(command[0]).name:
        command = command[1:]
    if not command or not command[0].endswith("_softmoe.py"):
        raise ValueError(f"{' '.join(sys.argv[1:])}: not a command such as python dqn_softmoe.py")
    sys.argv = command
    script = importlib.import_module(Path(command[0]).stem)
    args = script.parse_args()
    script.check_args(args)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, ale-py {ale_py.__version__}"
    report(True, "versions", versions)
    device_works = check_device(script, args)
    fits = check_game(script, args) and check_memory(script, args) and check_disk(script, args)
    return int(not (device_works and fits and probe(script, args, 20)))


if __name__ == "__main__":
    raise SystemExit(main())
