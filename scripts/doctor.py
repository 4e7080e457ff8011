"""Whether a command will run here, and how long it will take, before it takes days.

    python scripts/doctor.py python dqn_softmoe.py --num-experts 8 --env-id BreakoutNoFrameskip-v4

Says versions, GPU and compiler, the game's ROM, the memory and disk that the command needs and that there are, and runs
it for 20 seconds, or up to a minute, to see how fast it is. Exit code 1 where something is missing.
"""

import csv
import importlib
import os
import platform
import shutil
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


def say(good: bool | None, what: str, text: str) -> bool:
    """A line; None is neither good nor bad."""
    print(f"{ {True: 'ok', False: 'NO', None: '--'}[good] }  {what:12} {text}", flush=True)
    return good is not False


def check_device(args, script) -> bool:
    try:
        device = script.open_device(args)
    except ValueError as error:
        return say(False, "device", str(error))
    if device.type == "cpu":
        return say(None, "device", f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads")
    free, total = torch.cuda.mem_get_info()
    return say(True, "device", f"{torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free")


def check_game(args, script) -> bool:
    try:
        envs = script.Environments(args, 1)
    except Exception as error:
        return say(False, "game", f"{args.env_id}: {error}")
    rom = f"; ROM {Path(ale_py.roms.get_rom_path(envs.game)).name}" if envs.game else ""
    return say(True, "game", f"{args.env_id}, {envs.num_actions} actions, frames of {envs.frame_shape}{rom}")


def needs(args, script) -> tuple[int, int]:
    """Bytes of the replay, or offline of the unpacked data; and of a file of weights."""
    envs = script.Environments(args, 1)
    q_network = script.QNetwork(args, (script.STACK_SIZE, *envs.frame_shape), envs.num_actions)
    weights = sum(parameter.nbytes for parameter in q_network.parameters())
    if hasattr(args, "buffer_size"):
        replay = script.ReplayBuffer(args.buffer_size, args.num_envs, envs.frame_shape)  # takes no memory yet
        return sum(buffer.nbytes for buffer in replay.buffers()), weights
    archives = (zipfile.ZipFile(path) for path in Path(args.dataset_dir).glob("**/[0-9]*.npz"))
    return sum(info.file_size for archive in archives for info in archive.infolist()), weights


def check_memory(args, script) -> bool:
    if not hasattr(args, "buffer_size"):
        need, _ = needs(args, script)
        data = f"{args.dataset_dir or 'no --dataset-dir'}, {need / 1e9:.1f} GB unpacked, mapped from the disk"
        return say(need > 0, "data", data)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    try:
        place = script.replay_device(args, script.Environments(args, 1).frame_shape, device)
    except ValueError as error:
        return say(False, "memory", str(error))
    need, free = needs(args, script)[0] / 1e9, script.free_memory() / 1e9
    return say(True, "memory", f"a replay of {need:.1f} GB on the {place}; {free:.1f} GB of the host's are free")


def check_disk(args, script) -> bool:
    runs_dir, (need, weights) = Path(args.runs_dir).absolute(), needs(args, script)
    folder = next(path for path in (runs_dir, *runs_dir.parents) if path.exists())
    length = getattr(args, "total_timesteps", None) or args.total_updates
    if hasattr(args, "buffer_size"):
        need *= 2 * min(1, length / args.buffer_size)  # a checkpoint is written beside the last
        need += 100 * length * args.save_replay
    need += weights * (length // args.weights_every if args.weights_every else 1)
    free = shutil.disk_usage(folder).free
    return say(need < free, "disk", f"up to {need / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free")


WARM_UP = 12  # rows of metrics.csv before those that count: they learn nothing, or compile


def probe(script, args, seconds: float, at_most: float = 60) -> bool:
    """Run it with an early start of learning, on a smaller ring, until the time is over and there is a number."""
    if not hasattr(args, "total_timesteps"):
        return say(None, "speed", "not tried: it depends on the data")
    with tempfile.TemporaryDirectory() as folder:
        start = max(400, 2 * args.num_envs * (args.n_step + 2))
        settings = {
            "total_timesteps": 10**9,
            "buffer_size": max(20_000, 2 * start),
            "learning_starts": start,
            "iteration_steps": start // 10,
        }
        settings |= {"checkpoint_every": 0, "weights_every": 0, "runs_dir": folder, "run_name": "probe", "resume": None}
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
    if child.returncode != -9:
        return say(False, "speed", error[-1] if error else f"exit code {child.returncode}")
    if not rates:
        return say(None, "speed", f"no number within {at_most:g} s: the machine is slow, or busy with other work")
    rate = np.median(rates).item()
    hours = args.total_timesteps / rate / 3600
    return say(True, "speed", f"{rate:.0f} agent steps/s while learning: {hours:.1f} hours, without the evaluation")


def main() -> int:
    command = sys.argv[1:]
    if command in ([], ["-h"], ["--help"]):
        with dqn_softmoe.one_line_errors(OSError):
            print(__doc__, flush=True)
        return 0
    if "python" in Path(command[0]).name:
        command = command[1:]
    if not command or not command[0].endswith("_softmoe.py"):
        print(f"error: {' '.join(sys.argv[1:])}: not a command such as python dqn_softmoe.py", file=sys.stderr)
        return 2
    sys.argv = command
    with dqn_softmoe.one_line_errors(Exception):
        script = importlib.import_module(Path(command[0]).stem)
        args = script.parse_args()
        script.check_args(args)
    say(True, "versions", f"Python {platform.python_version()}, torch {torch.__version__}, ale-py {ale_py.__version__}")
    good = [check_device(args, script), check_game(args, script)]
    for check in (check_memory, check_disk):
        good.append(good[-1] and check(args, script))
    good.append(all(good) and probe(script, args, 20))
    return int(not all(good))


if __name__ == "__main__":
    raise SystemExit(main())
