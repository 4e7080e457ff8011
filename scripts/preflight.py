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
# Flags that change the speed most. Hours are told only where they have the values with which it was measured.
MEASURED = "distributional replay_ratio batch_size num_envs encoder_width impala_filter expert_variant".split()


def parse(script: Path, flags: list[str]) -> object:
    """Return the checked Args of a command. Raises ValueError with the message of an agent that refuses it."""
    sys.path.insert(0, str(script.resolve().parent))
    module = importlib.import_module(script.stem)
    sys.argv, stderr = [script.name, *flags], io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), module.one_line_errors(Exception):
            args = module.parse_args()
            module.check_args(args)
        return args
    except SystemExit:
        lines = [line.strip("│ ") for line in stderr.getvalue().splitlines()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raise ValueError(errors[0] if errors else lines[1]) from None  # tyro draws a box around its message


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
    cases = [c for c in reversed(record["cases"]) if c["rates"]]  # the first of a kind has the default settings
    speeds = {(f"{c['agent']}_softmoe", c["encoder"], c["layer"]): median(c["rates"]) for c in cases}
    numbers, checked, failures, known = [int(word) for word in sys.stdin.read().split()], {}, {}, []
    for number in numbers:
        try:
            words = [] if re.search("[;|&<>$]", lines[number - 1]) else shlex.split(lines[number - 1], comments=True)
            if len(words) < 2 or words[0] != "python" or not words[1].endswith("_softmoe.py"):
                continue
            script, flags = Path(words[1]), words[2:]
            if not script.exists():
                raise ValueError(f"{script} is not in {Path.cwd()}; call this from its folder")
            pairs = [*itertools.pairwise(["", *flags])]
            own = {flag: word for flag, word in pairs if flag in ("--env-id", "--seed", "--run-name")}
            shared = (script, *(word for before, word in pairs if before not in own))
            keys = [shared, *((script, flag, word) for flag, word in own.items() if flag != "--run-name")]
            if not all(key in checked for key in keys):
                checked |= dict.fromkeys(keys, hours(parse(script, flags), speeds))
        except ValueError as error:  # the agent refuses an argument, or a quotation mark is missing
            failures.setdefault(str(error), []).append(number)
            continue
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
