"""Check the commands of a list before the first one runs. sweep.sh calls this script.

    seq 1 2400 | python scripts/preflight.py fig1.list

Reads the line numbers to check from standard input. Each agent's command is parsed and checked as the agent does it.
Lines that differ only in game, seed and run name are checked once per game and per seed. Prints each error once and
exits with code 2. Without errors, prints the number of runs and the GPU hours of those whose speed is on record.
"""

import contextlib
import importlib
import io
import itertools
import json
import re
import shlex
import sys
from pathlib import Path
from statistics import median

RECORD = Path(__file__).parent / "results" / "benchmark_h200" / "benchmark.json"
# Flags that change the speed. They had their default values when it was measured.
MEASURED = "distributional replay_ratio batch_size num_envs encoder_width impala_filter expert_variant".split()


def parse(script: Path, flags: list[str]) -> tuple[object, str]:
    """Return the Args of a command and an empty string, or None and the error message."""
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
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return None, errors[0] if errors else lines[1]  # tyro draws a box around its message


def hours(args, speeds: dict) -> float | None:
    """Return the hours that a run takes, or None if its speed is not on record."""
    script = sys.modules[type(args).__module__]
    default = script.Args(layer=args.layer)
    rate = speeds.get((script.__name__, args.encoder, args.layer))
    as_measured = all(getattr(args, name, None) == getattr(default, name, None) for name in MEASURED)
    length = getattr(args, "total_timesteps", None) or args.total_updates
    return length / rate / 3600 if rate and as_measured else None


def main() -> int:
    lines = Path(sys.argv[1]).read_text().splitlines()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"cases": []}
    speeds = {(f"{c['agent']}_softmoe", c["encoder"], c["layer"]): median(c["rates"]) for c in record["cases"]}
    numbers, checked, failures, known = [int(word) for word in sys.stdin.read().split()], {}, {}, []
    for number in numbers:
        try:
            words = [] if re.search("[;|&<>$]", lines[number - 1]) else shlex.split(lines[number - 1], comments=True)
        except ValueError as error:  # a quotation mark is missing
            failures.setdefault(str(error), []).append(number)
            continue
        if len(words) < 2 or words[0] != "python" or not words[1].endswith("_softmoe.py"):
            continue
        script, flags = Path(words[1]), words[2:]
        if not script.exists():
            print(f"error: line {number}: {script} is not in {Path.cwd()}; call this from its folder", file=sys.stderr)
            return 2
        own = {flag: word for flag, word in itertools.pairwise(flags) if flag in ("--env-id", "--seed", "--run-name")}
        shared = (script, *(word for before, word in itertools.pairwise(["", *flags]) if before not in own))
        keys = [shared, *((script, flag, word) for flag, word in own.items() if flag != "--run-name")]
        if not all(key in checked for key in keys):
            args, failure = parse(script, flags)
            if failure:
                failures.setdefault(failure, []).append(number)
                continue
            checked |= dict.fromkeys(keys, hours(args, speeds))
        if checked[shared]:
            known.append(checked[shared])
    for failure, where in failures.items():
        print(f"error: line{'s' * (len(where) > 1)} {', '.join(map(str, where))}: {failure}", file=sys.stderr)
    if failures:
        return 2
    message = f"{len(numbers):,} runs are left"
    if sum(known) >= 1:
        message += f": about {sum(known):,.0f} hours on one {record['machine']['gpu']}"
        if unknown := len(numbers) - len(known):
            message += f", and {unknown:,} runs whose speed is not on record"
    print(message, file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
