"""How much of the training loop is learning: agent steps/s against the bare update of the same network.

    python scripts/benchmark.py dqn_softmoe --layer dense --encoder nature

Takes the name of a script that plays and the script's flags. One process measures, by turns, the bare update (forward,
target, backward, Adam on a fixed batch) and the whole training loop (environments, acting, replay, logging) at the same
settings, because timings of one machine drift. Prints one line per turn, then the medians. The loop's ideal is one
update in the time of the bare one, `1 / replay_ratio` agent steps per update; the overhead is what is missing to that.
On a GPU both are compiled and captured in CUDA graphs, as the script's flags say.
"""

import contextlib
import csv
import importlib
import io
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["der_softmoe", "dqn_softmoe", "rainbow_softmoe"]  # cql_softmoe.py only updates; its metrics.csv has how fast
if sys.argv[1:] in (["--help"], ["-h"]):
    print(__doc__)
    raise SystemExit
if not (len(sys.argv) > 1 and sys.argv[1] in SCRIPTS):
    print(f"error: the first argument must be one of {', '.join(SCRIPTS)}", file=sys.stderr)
    raise SystemExit(2)
sys.path.insert(0, str(ROOT))
script = importlib.import_module(sys.argv.pop(1))


@dataclass
class BenchmarkArgs(script.Args):
    # Benchmark
    turns: int = 5  # times that each measurement is taken
    steps: int = 1_000  # agent steps of learning timed in a turn, after as many without learning and as many to warm up


def bare_update_seconds(args: BenchmarkArgs, repeats: int) -> float:
    """Median seconds of forward, target, backward and Adam on a batch that stays where it is."""
    envs = script.Environments(args, 1)
    agent = script.Agent(replace(args, buffer_size=50_000, replay_device="cpu"), envs)
    B, shape = args.batch_size, (args.batch_size, script.STACK_SIZE, *envs.frame_shape)
    frames = [torch.randint(0, 256, shape, dtype=torch.uint8, device=agent.device) for _ in range(2)]
    action = torch.randint(envs.num_actions, (B,), device=agent.device)
    reward, discount = torch.rand(B, device=agent.device), torch.full((B,), args.gamma, device=agent.device)
    batch = script.Batch(frames[0], action, reward, discount, frames[1], action)
    seconds = []
    for _ in range(repeats + 20):  # the first ones warm up, and capture the graph
        start = time.perf_counter()
        agent.update(*batch)
        if agent.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[20:])


def loop_steps_per_second(args: BenchmarkArgs) -> float:
    """Agent steps per second of the training loop, over the last `args.steps` steps."""
    with tempfile.TemporaryDirectory() as runs_dir:
        short = {"total_timesteps": 3 * args.steps, "learning_starts": args.steps, "buffer_size": 50_000}
        short |= {"iteration_steps": args.steps, "checkpoint_every": 0, "eval_episodes": 0, "runs_dir": runs_dir}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            script.main(replace(args, **short))
        (metrics,) = Path(runs_dir).glob("*/metrics.csv")
        with open(metrics, newline="") as file:
            return float(list(csv.DictReader(file))[-1]["sps"])


def run(args: BenchmarkArgs) -> None:
    ratios, rates, bares = [], [], []
    for turn in range(args.turns):
        before = bare_update_seconds(args, 30)
        rate = loop_steps_per_second(args)
        bare = (before + bare_update_seconds(args, 30)) / 2
        ratio = rate * args.replay_ratio * bare
        print(f"turn {turn + 1}: bare update {1e3 * bare:.1f} ms, loop {rate:.1f} agent steps/s, ratio {ratio:.3f}")
        ratios, rates, bares = [*ratios, ratio], [*rates, rate], [*bares, bare]
    on_gpu, threads = args.cuda and torch.cuda.is_available(), f"CPU, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if on_gpu else threads
    network = f"{args.layer}, {args.encoder}, {args.num_experts} experts"
    print(f"{script.__name__}, {args.env_id}, {network}, seed {args.seed}, on {where}")
    ratio = statistics.median(ratios)
    print(
        f"median of {args.turns}: bare update {1e3 * statistics.median(bares):.1f} ms, "
        f"loop {statistics.median(rates):.1f} agent steps/s, ratio {ratio:.3f} (overhead {1 - ratio:.1%})"
    )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    run(tyro.cli(BenchmarkArgs, description=__doc__.split("\n\n")[0]))
