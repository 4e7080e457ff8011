"""Measure how fast the agents are and how the time divides among the parts of their loop.

    python scripts/benchmark.py --quick                           # a few cases, in less than two minutes
    python scripts/benchmark.py                                   # all agents, encoders and layers, and the extras
    python scripts/benchmark.py --agents dqn --encoders nature --layers dense --no-extras

A case runs the script of an agent in a process of its own, which pauses after each iteration. The cases take turns,
because the speed of a machine drifts. After an iteration each part of the loop is timed alone, with the agent in its
current state: act, store, draw, update (forward, target, backward, Adam), priorities and emulation. The parts may sum
up to more than the loop, because emulation overlaps with learning. The extras are 1 to 64 experts, encoders of 2 and 4
times the width, 8 and 16 environments and, on a GPU, the other modes: eager, compiled and graphed code. Prints medians
and writes benchmark.json and benchmark.png.
"""

import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import ale_py
import numpy as np
import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Values of --compile and --cuda-graphs in each mode.
MODES = {"eager": (False, False), "compiled": (True, False), "graph": (False, True), "compiled+graph": (True, True)}
GROUP_SIZE = 16  # cases whose processes run at the same time
NAMES = {"dqn": "DQN", "rainbow": "Rainbow", "der": "DER", "cql": "CQL", "impala": "Impala", "nature": "Nature"}
NAMES |= {"softmoe": "Soft MoE", "top1moe": "Top-1 MoE", "dense": "dense"}
BEST = "compiled+graph" if torch.cuda.is_available() else "eager"


@dataclass
class Options:
    agents: tuple[Literal["dqn", "rainbow", "der", "cql"], ...] = ("dqn", "rainbow", "der", "cql")
    encoders: tuple[Literal["impala", "nature"], ...] = ("impala", "nature")
    layers: tuple[Literal["softmoe", "top1moe", "dense"], ...] = ("softmoe", "top1moe", "dense")
    modes: tuple[Literal["eager", "compiled", "graph", "compiled+graph"], ...] = ()  # how code runs (default: fastest)
    extras: bool = True  # also measure 1 to 64 experts, wider encoders, more environments and, on a GPU, all modes
    quick: bool = False  # one turn, the Nature CNN, one layer per agent, no extras and at most 2 minutes
    turns: int = 3  # measurements of each case
    updates: int | None = None  # updates per iteration (default: GPU 500, CPU 25)
    minutes: float = 8.0  # time limit; cases that are not ready by then are left out
    env_id: str = "BreakoutNoFrameskip-v4"  # environment
    output: Path = Path("benchmark")  # folder for benchmark.json and benchmark.png
    cuda: bool = True  # run on the GPU if there is one

    def __post_init__(self):
        self.cuda = self.cuda and torch.cuda.is_available()
        self.modes = self.modes or ((BEST,) if self.cuda else ("eager",))
        if self.updates is None:
            self.updates = 500 if self.cuda else 25
        if self.quick:
            self.turns, self.minutes, self.extras = 1, min(self.minutes, 2.0), False


@dataclass
class Case:
    agent: str
    encoder: str
    layer: str
    mode: str
    num_experts: int | None = None
    encoder_width: int | None = None
    num_envs: int | None = None
    rates: list[float] = field(default_factory=list)  # agent steps (CQL: updates) per second
    parts: dict[str, list[float]] = field(default_factory=dict)  # seconds per call
    calls: dict[str, float] = field(default_factory=dict)  # calls per agent step (CQL: per update)
    parameters: int = 0
    gigabytes: float = 0.0  # peak memory of the GPU or, without one, of the process
    failure: str = ""

    def __str__(self) -> str:
        labels = [" ".join(NAMES[part] for part in (self.agent, self.encoder, self.layer))]
        labels += [f"{self.num_experts} expert{'s' * (self.num_experts != 1)}"] if self.num_experts else []
        labels += [f"width x{self.encoder_width}"] if self.encoder_width else []
        labels += [f"{self.num_envs} environments"] if self.num_envs else []
        return ", ".join(labels + [self.mode] * (self.mode != BEST))


def cases(options: Options) -> list[Case]:
    """Return the cases to measure, the most important ones first."""
    if options.quick:
        networks = [("dqn", "nature", "dense"), *((agent, "nature", "softmoe") for agent in options.agents)]
        return [Case(*network, mode) for network in networks for mode in options.modes]
    networks = itertools.product(options.layers, options.encoders, options.agents, options.modes)
    found = [Case(agent, encoder, layer, mode) for layer, encoder, agent, mode in networks]
    if options.extras:
        best, softmoe, dense = options.modes[-1], ("dqn", "impala", "softmoe"), ("dqn", "nature", "dense")
        found += [Case(*softmoe, best, num_experts=2**k) for k in range(7)]
        found += [Case(*softmoe, best, encoder_width=width) for width in (2, 4)]
        found += [Case(*dense, best, num_envs=num_envs) for num_envs in (8, 16)]
        others = [mode for mode in MODES if options.cuda and mode not in options.modes]
        found += [Case(*network, mode) for network in (dense, ("rainbow", "impala", "softmoe")) for mode in others]
    return found


def seconds_per_call(function, seconds: float) -> float:
    """Return the mean seconds per call, as many as fit into `seconds`. Waits for the GPU before and after."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    function()
    wait()
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < seconds:
        function()
        calls += 1
    wait()
    return (time.perf_counter() - start) / calls


def parts_of(script, agent, envs) -> tuple[dict, dict]:
    """Return a function for each part of the loop, and how often it is called per agent step (CQL: per update)."""
    args, graphs = agent.args, agent.args.cuda_graphs and agent.device.type == "cuda"
    capture = script.CudaGraph if graphs else lambda function: function
    replay = agent.replay if hasattr(agent, "replay") else agent.data
    batch = script.Batch(*(x.to(agent.device) for x in replay.sample(args.batch_size)))
    losses = torch.ones(args.batch_size, device=agent.device)
    parts = {"update": capture(lambda: agent.update(*batch)), "draw": capture(lambda: replay.sample(args.batch_size))}
    if not hasattr(agent, "act"):
        return parts, dict.fromkeys(parts, 1.0)
    if getattr(args, "prioritized", False):
        parts["priorities"] = capture(lambda: replay.update_priorities(batch.index, losses))
    calls, N = dict.fromkeys(parts, args.replay_ratio), args.num_envs
    frame, action = np.zeros((N, *envs.frame_shape), np.uint8), np.zeros(N, np.int64)
    reward, ended = np.zeros(N), np.zeros(N, bool)

    def emulate():
        envs.send(action)
        envs.recv()

    envs.reset(0)
    parts["act"] = lambda: agent.act(frame, ended, np.float64(0)).cpu()
    parts |= {"store": lambda: agent.observe(reward, ended, ended), "emulation": emulate}
    return parts, calls | dict.fromkeys(("act", "store", "emulation"), 1 / N)


def work(case: Case, options: Options, folder: Path, data: Path, connection) -> None:
    """Run the script of a case. After each iteration measure the parts, send the case and wait for the next turn."""
    tqdm.set_lock(threading.RLock())  # the default lock, a system semaphore, outlives a process that is killed
    for descriptor, path in ((1, os.devnull), (2, folder / str(os.getpid()))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    script, built, warm_until = importlib.import_module(f"{case.agent}_softmoe"), {}, options.updates
    offline, (compile, cuda_graphs) = case.agent == "cql", MODES[case.mode]
    settings = {"env_id": options.env_id, "encoder": case.encoder, "layer": case.layer, "compile": compile}
    settings |= {"cuda": options.cuda, "cuda_graphs": cuda_graphs, "checkpoint_every": 0}
    settings |= {"runs_dir": str(folder / f"runs{os.getpid()}")}
    settings |= {name: n for name in ("num_experts", "encoder_width", "num_envs") if (n := getattr(case, name))}
    if offline:
        settings |= {"iteration_updates": options.updates, "total_updates": 10**9, "dataset_dir": str(data)}
    else:
        steps = int(options.updates / script.Args.replay_ratio)
        settings |= {"iteration_steps": steps, "total_timesteps": 10**9, "learning_starts": 100, "buffer_size": 100_000}
        warm_until = 100 + steps

    class Agent(script.Agent):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            built["agent"], built["envs"] = self, script.Environments(self.args, self.args.num_envs)

    class RunLog(script.RunLog):
        def iteration(self, now, *arguments):
            case.rates.append(arguments[0] if offline else self.sps(now))
            super().iteration(now, *arguments)
            if now >= warm_until:
                if "parts" in built:
                    for name, function in built["parts"].items():
                        case.parts.setdefault(name, []).append(seconds_per_call(function, 0.2))
                else:
                    built["parts"], case.calls = parts_of(script, built["agent"], built["envs"])
                    for function in [*built["parts"].values()] * 12:  # warm up and capture CUDA graphs
                        function()
                    case.rates, case.parts = [], {}
                case.parameters = sum(p.numel() for p in built["agent"].q_network.parameters())
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                case.gigabytes = (torch.cuda.max_memory_allocated() if options.cuda else peak) / 1e9
                connection.send(case)
                connection.recv()
            self.started = now, time.monotonic()  # the speed of the next iteration does not include the measurement

    script.Agent, script.RunLog, script.evaluate = Agent, RunLog, lambda *_: [0.0]
    script.main(script.Args(**settings))


def measure(group: list[Case], options: Options, folder: Path, data: Path, deadline: float, bar: tqdm) -> list[Case]:
    """Warm up the cases side by side and measure them in turns until the deadline. Returns the measured cases."""
    measured, context, running = list(group), multiprocessing.get_context("spawn"), []

    def receive(number: int, connection, process) -> bool:
        """Wait for the next report of a case. Returns False if the case fails or is not ready in time."""
        try:
            if connection.poll(max(deadline - time.monotonic(), 1)):
                measured[number] = connection.recv()
            else:
                measured[number].failure = f"not ready within {options.minutes:g} minutes"
                process.kill()
        except (EOFError, OSError):  # the process has ended
            process.join()
            measured[number].failure = ((folder / str(process.pid)).read_text().strip() or "?").splitlines()[-1]
        bar.update()
        return not measured[number].failure

    try:
        for number, case in enumerate(group):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(case, options, folder, data, theirs))
            process.start()
            theirs.close()
            running.append((number, ours, process))
        running = [entry for entry in running if receive(*entry)]
        for turn in range(options.turns):
            if turn == 0 or time.monotonic() < deadline:
                for number, connection, process in list(running):
                    with contextlib.suppress(OSError):  # the process was killed
                        connection.send("go on")
                    if not receive(number, connection, process):
                        running.remove((number, connection, process))
    finally:
        for _, connection, process in running:
            connection.close()
            process.kill()
    return measured


def run(options: Options, folder: Path) -> list[Case]:
    """Measure all cases, a group at a time so that they fit into memory."""
    todo, done, deadline = cases(options), [], time.monotonic() + 60 * options.minutes
    data = make_data(options, folder) if "cql" in options.agents else folder
    with tqdm(total=len(todo) * (1 + options.turns), desc="warm-ups and turns", dynamic_ncols=True) as bar:
        for start in range(0, len(todo), GROUP_SIZE):
            done += measure(todo[start : start + GROUP_SIZE], options, folder, data, deadline, bar)
    return done


def make_data(options: Options, folder: Path) -> Path:
    """Save transitions of a random policy for the offline agent and return the directory of the run."""
    flags = "--total-timesteps 4000 --encoder nature --layer dense --buffer-size 10000 --no-cuda --eval-episodes 0"
    command = [sys.executable, ROOT / "dqn_softmoe.py", *flags.split(), "--save-replay", "--env-id", options.env_id]
    subprocess.run([*command, "--runs-dir", folder, "--run-name", "data"], capture_output=True)
    return folder / "data"


def machine(options: Options) -> dict:
    """Return the hardware and the versions that the speed depends on."""
    path = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", path.read_text() if path.exists() else "")
    cpu = model[1] if model else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if options.cuda else "none"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "ale_py": ale_py.__version__}
    return {"gpu": gpu, "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()} | versions


PARTS = {  # color (Okabe and Ito's palette) and hatch of each part in the picture
    "update": ("#0072B2", ""),
    "draw": ("#56B4E9", "//"),
    "priorities": ("#CC79A7", "xx"),
    "act": ("#009E73", ""),
    "store": ("#F0E442", ".."),
    "emulation": ("#E69F00", "\\\\"),
}


def medians(case: Case) -> dict[str, float]:
    """Return the steps (CQL: updates) per second of the loop as `rate`, and the seconds per step of each part."""
    parts = {name: statistics.median(times) * case.calls[name] for name, times in case.parts.items()}
    return {"rate": statistics.median(case.rates), **parts}


def table(done: list[Case]) -> str:
    """Format the speeds of the cases, and the share of each part, in 80 columns."""
    labels = ("update", " draw", " prio", " act", " store", " emul")
    lines = [f"{'':33}{'loop':>7}{'update':>8}  share of the loop's time, %"]
    lines.append(f"{BEST + ' code':33}{'1/s':>7}{'1/s':>8} {''.join(labels)}")
    for case in done:
        found = medians(case)
        shares = {name: f"{100 * found[name] * found['rate']:.0f}" if name in found else "-" for name in PARTS}
        cells = "".join(f"{share:>{len(label)}}" for share, label in zip(shares.values(), labels, strict=True))
        rates = (found["rate"], 1 / statistics.median(case.parts["update"]))
        loop, update = (f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" for rate in rates)
        lines.append(f"{case!s:33}{loop:>7}{update:>8} {cells}")
    return "\n".join(lines)


def picture(done: list[Case], title: str, path: Path) -> None:
    """Draw the milliseconds per step of each part, as stacked bars, and of the whole loop."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: it needs matplotlib (pip install -r scripts/requirements.txt)", file=sys.stderr)
        return
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.3 * len(done)), layout="constrained")
    left, names = np.zeros(len(done)), [str(case) for case in done]
    found = [medians(case) for case in done]
    for part, (color, hatch) in PARTS.items():
        width = np.array([1e3 * values.get(part, 0) for values in found])
        axes.barh(names, width, left=left, color=color, edgecolor="black", linewidth=0.5, hatch=hatch, label=part)
        left += width
    for color, width in (("white", 5), ("black", 2.5)):  # black marks with a white border
        axes.plot([1e3 / values["rate"] for values in found], names, "|", color=color, ms=15, mew=width)
    axes.plot([], [], "|", color="black", ms=15, mew=2.5, label="the loop")
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per agent step (CQL: per update)")
    axes.set_title(title, fontsize=9)
    figure.legend(fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=150)


def main(options: Options) -> int:
    if min(options.turns, options.updates) < 1 or options.output.is_file():
        print("error: --turns and --updates must be at least 1, and --output must not be a file", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        measured = run(options, Path(folder))
    done, hardware = [case for case in measured if case.rates and case.parts], machine(options)
    options.output.mkdir(parents=True, exist_ok=True)
    content = {"machine": hardware, "options": asdict(options), "cases": [asdict(case) for case in measured]}
    (options.output / "benchmark.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    title = hardware["gpu"] if options.cuda else f"{hardware['cpu']}, threads: {hardware['threads']}"
    versions = f"torch {hardware['torch']}, ale-py {hardware['ale_py']}"
    print(f"{title}; {versions}; median of {options.turns} turns\n{table(done)}")
    picture(done, title, options.output / "benchmark.png")
    for case in measured:
        if case.failure:
            print(f"not measured: {case}: {case.failure}")
    return int(any(case.failure for case in measured))


if __name__ == "__main__":
    with importlib.import_module("dqn_softmoe").one_line_errors(OSError):
        raise SystemExit(main(tyro.cli(Options, description=__doc__.split("\n\n")[0])))
