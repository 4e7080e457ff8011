"""Whether the scripts take the commands of a list, before the first one runs; sweep.sh calls this.

    seq 1 2400 | python scripts/preflight.py fig1.list

Reads the numbers of the lines that are left. A line of `python dqn_softmoe.py`, or another agent, is parsed and checked
as that script does it; lines that differ in the game, the seed and the name alone only once for each of these. Errors
are told once, with the numbers of their lines, and the exit code is 2. Then says how many runs are left, and how many
hours of a GPU they take where a record has the speed of such a run.
"""

import contextlib
import importlib
import io
import json
import re
import shlex
import statistics
import sys
from pathlib import Path

RECORD = Path(__file__).parent / "results" / "benchmark_h200" / "benchmark.json"
# Flags on which the speed depends, and which had their defaults when it was measured.
MEASURED = "distributional replay_ratio batch_size num_envs encoder_width impala_filter expert_variant".split()


def parse(script: Path, flags: list[str]) -> tuple[object, str]:
    """Args of a command, or the line that says why there are none."""
    sys.path.insert(0, str(script.resolve().parent))
    module = importlib.import_module(script.stem)
    sys.argv, stderr = [script.name, *flags], io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), module.one_line_errors(Exception):
            args = module.parse_args()
            module.check_args(args)
        return args, ""
    except SystemExit:
        lines = [line.strip("│ ") for line in stderr.getvalue().splitlines()]
        errors = [line for line in lines if line.startswith("error: ")]
        return None, errors[0] if errors else lines[1]  # tyro's messages have a frame


def hours(args, speeds: dict) -> float | None:
    """Of the whole run, where its speed is on record."""
    script = sys.modules[type(args).__module__]
    default = script.Args(layer=args.layer)
    rate = speeds.get((script.__name__, args.encoder, args.layer))
    same = all(getattr(args, name, None) == getattr(default, name, None) for name in MEASURED)
    length = getattr(args, "total_timesteps", None) or args.total_updates
    return length / rate / 3600 if rate and same else None


def main() -> int:
    lines = Path(sys.argv[1]).read_text().splitlines()
    cases = json.loads(RECORD.read_text())["cases"] if RECORD.exists() else []
    speeds = {(f"{c['agent']}_softmoe", c["encoder"], c["layer"]): statistics.median(c["rates"]) for c in cases}
    seen, failures, total, without, numbers = {}, {}, 0.0, 0, [int(word) for word in sys.stdin.read().split()]
    for number in numbers:
        words = [] if re.search("[;|&<>$]", lines[number - 1]) else shlex.split(lines[number - 1], comments=True)
        if len(words) < 2 or words[0] != "python" or not words[1].endswith("_softmoe.py"):
            without += 1
            continue
        script, flags = Path(words[1]), words[2:]
        if not script.exists():
            print(f"error: line {number}: {script} is not in {Path.cwd()}; call this from its folder", file=sys.stderr)
            return 2
        its_own = {flag: value for flag, value in zip(flags, flags[1:], strict=False) if flag in ("--env-id", "--seed")}
        name = flags[flags.index("--run-name") + 1 :][:1] if "--run-name" in flags else []
        shared = (script, *(word for word in flags if word not in [*its_own.values(), *name]))
        keys = [shared, *((script, *pair) for pair in its_own.items())]
        if not all(key in seen for key in keys):
            args, failure = parse(script, flags)
            if failure:
                failures.setdefault(failure, []).append(number)
                continue
            seen |= dict.fromkeys(keys, hours(args, speeds))
        total, without = total + (seen[shared] or 0), without + (seen[shared] is None)
    for failure, those in failures.items():
        text = f"line{'s' * (len(those) > 1)} {', '.join(map(str, those))}: {failure.removeprefix('error: ')}"
        print(f"error: {text}", file=sys.stderr)
    if failures:
        return 2
    gpu = json.loads(RECORD.read_text())["machine"]["gpu"] if total else ""
    known = f": about {total:,.0f} hours on one {gpu}" if total >= 1 else ""
    rest = f", and {without:,} runs whose speed is not on record" if known and without else ""
    print(f"{len(numbers):,} runs are left{known}{rest}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
