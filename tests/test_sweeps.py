"""Tests of figure.sh, sweep.sh, preflight.py and sweep.sbatch: lists of commands are valid, and run to their end."""

import fcntl
import importlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from runs import HELPERS, ROOT, checkpoint, wait_for

FIGURE = ROOT / "scripts" / "figure.sh"
FIGURES = "1 4 5 6 7 8 9 10 11 12 13 16 18 drq_eps tokenize".split()
PATH = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # so that `python` is this interpreter
SMALL = "--encoder nature --expert-hidden-dim 16 --learning-starts 200 --buffer-size 1000 --iteration-steps 200 "
SMALL += "--eval-episodes 1 --target-network-frequency 100 --no-cuda"


def shell(*command, cwd=ROOT, **settings):
    settings = {"PATH": PATH, "PYTHONPATH": f"{ROOT}:{HELPERS}", "OMP_NUM_THREADS": "1"} | settings
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | settings)


def parse(line, monkeypatch):
    """Return the name of the script and the checked Args of a command."""
    _, script, *flags = shlex.split(line)
    script = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [script.__file__, *flags])
    args = script.parse_args()
    script.check_args(args)
    return script.__name__, args


@pytest.mark.parametrize("figure", FIGURES)
def test_every_line_is_a_valid_command(figure, monkeypatch):
    done = shell(FIGURE, figure, GAMES="Pong", SEEDS="1 2", STEPS="77777")
    lines = done.stdout.splitlines()
    assert done.stderr == "" and len(lines) == len(set(lines)) > 3 and len(lines) % 2 == 0
    names = set()
    for line in lines[::2]:
        _, args = parse(line, monkeypatch)
        assert (args.seed, args.env_id, args.resume) == (1, "PongNoFrameskip-v4", "auto")
        assert 77_777 in (getattr(args, "total_timesteps", None), getattr(args, "total_updates", None))
        names.add(args.run_name)
    assert len(names) == len(lines) / 2


def test_help_has_every_figure_and_no_command_of_a_list():
    done = shell(FIGURE, "--help")
    assert done.returncode == 0 and "GAMES" in done.stdout and "python " not in done.stdout
    figures = {name for line in done.stdout.splitlines() for name in line[:11].replace(",", "").split()}
    assert set(FIGURES) - {"13"} <= figures and "13 to 15" in done.stdout


def test_the_paper_s_games_seeds_and_lengths_are_the_defaults():
    lines = shell(FIGURE, "12").stdout.splitlines()
    assert len(lines) == 2 * 3 * 26 * 5 and not any("--total" in line for line in lines)
    one = {"GAMES": "Pong", "SEEDS": "3", "FLAGS": "--eval-episodes 7", "RUNS_DIR": "elsewhere"}
    line = shell(FIGURE, "12", **one).stdout.splitlines()[0]
    assert "--eval-episodes 7" in line and "-7__seed3 " in line
    assert "--runs-dir elsewhere --run-name Pong__der__" in line
    assert len(shell(FIGURE, "1").stdout.splitlines()) == 2 * 3 * 4 * 20 * 5
    assert shell(FIGURE, "17").stdout == shell(FIGURE, "11").stdout


@pytest.mark.parametrize("figure, experts", [("12", 8), ("16", 4)])
def test_low_data_has_both_agents_with_three_layers(figure, experts, monkeypatch):
    lines = shell(FIGURE, figure, GAMES="Pong", SEEDS="1").stdout.splitlines()
    found = [parse(line, monkeypatch) for line in lines]
    layers = [("dense", 1), ("top1moe", experts), ("softmoe", experts)]
    assert [(name, args.layer, args.num_experts) for name, args in found] == [("der_softmoe", *x) for x in 2 * layers]
    for _, args in found[:3]:
        assert args.distributional and args.noisy and args.prioritized and not args.augment
    for _, args in found[3:]:
        assert not (args.distributional or args.noisy or args.prioritized) and args.augment
        assert (args.target_network_frequency, args.epsilon_decay_steps, args.encoder) == (1, 5_000, "impala")


@pytest.fixture
def sweep(tmp_path):
    """Return a function that writes a list of runs on the pixel game, and returns a function that sweeps the list."""
    path = tmp_path / "list.txt"

    def write_list(steps, seeds=(1, 2), flags=""):
        lines = [
            f"python {ROOT / 'dqn_softmoe.py'} --env-id pixel_game:PixelCatch-v0 --seed {seed} {SMALL} "
            f"--total-timesteps {steps} --runs-dir {tmp_path / 'runs'} --run-name run{seed} --resume auto {flags}"
            for seed in seeds
        ]
        path.write_text("\n".join(lines) + "\n")
        return lambda *given: shell(ROOT / "scripts" / "sweep.sh", "--jobs", "2", *given, path, cwd=tmp_path)

    return write_list


def test_a_sweep_runs_names_what_fails_and_finishes_what_is_left(sweep, tmp_path):
    run = sweep(300, seeds=(1,))
    line = (tmp_path / "list.txt").read_text()
    (tmp_path / "list.txt").write_text(line + line.replace("run1", "run2").replace("PixelCatch", "NoGame"))
    assert run("--status").stdout == "0 done, 0 running, 0 failed, 2 to do\n"
    done = run()
    assert done.returncode == 1, done
    failed, summary = done.stdout.splitlines()
    assert failed.startswith("line 2 failed (2): error: NameNotFound: "), failed
    assert summary == "1 done, 0 running, 1 failed, 0 to do"
    (tmp_path / "list.txt").write_text(line)  # without the faulty line
    before = (tmp_path / "runs" / "run1" / "weights.pt").stat().st_mtime_ns
    assert run().returncode == 0 and "1 done" in run("--status").stdout
    assert before == (tmp_path / "runs" / "run1" / "weights.pt").stat().st_mtime_ns
    assert "0 done" in sweep(800, seeds=(1,))("--status").stdout  # the run is not done, because it now has more steps


def test_mistakes_are_reported_before_anything_runs(sweep, tmp_path):
    run = sweep(400)
    first, second = (tmp_path / "list.txt").read_text().splitlines()
    wrong = [f"{second} --num-exprts 2", f"{first} --num-experts 0", second.replace("run2", "a") + " --num-exprts 2"]
    fifth, zeroth = (first.replace("--seed 1", f"--seed {seed}") for seed in (5, 0))
    # The last line differs from the one with seed 5 in more than the seed.
    wrong += [f'{first} "', f"{fifth} --batch-size 5", zeroth, f"{zeroth} --batch-size 0"]
    (tmp_path / "list.txt").write_text("\n".join([first, "# a comment", *wrong, second]) + "\n")
    done = run()
    assert (done.returncode, done.stdout) == (2, "") and not (tmp_path / "runs").exists()
    assert done.stderr.splitlines() == [
        "error: lines 3, 5: Unrecognized options: --num-exprts, 2",
        "error: line 4: --num-experts must be at least 1, not 0",
        "error: line 6: No closing quotation",
        "error: line 9: --batch-size must be at least 1, not 0",
    ]
    (tmp_path / "list.txt").write_text("python dqn_softmoe.py --seed 1\n")
    done = run()
    assert done.returncode == 2 and "dqn_softmoe.py is not in" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_hours_of_a_list_follow_from_the_recorded_speeds(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    preflight = importlib.import_module("preflight")
    monkeypatch.chdir(ROOT)
    record = {"machine": {"gpu": "a GPU"}, "cases": [{"agent": "dqn", "encoder": "impala", "layer": "softmoe"}]}
    record["cases"][0]["rates"] = [900, 1000, 2000]
    (tmp_path / "record.json").write_text(json.dumps(record))
    monkeypatch.setattr(preflight, "RECORD", tmp_path / "record.json")
    lines = [f"python dqn_softmoe.py --seed {seed} --total-timesteps 36000000" for seed in (1, 2, 3)]
    lines += ["python dqn_softmoe.py --layer dense", "python dqn_softmoe.py --replay-ratio 2", "true; true"]
    (tmp_path / "a.list").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "argv", ["preflight.py", str(tmp_path / "a.list")])
    monkeypatch.setattr(sys, "stdin", io.StringIO("2 3 4 5 6"))
    assert preflight.main() == 0
    expected = "5 runs are left: about 20 hours on one a GPU, and 3 runs whose speed is not on record\n"
    assert capsys.readouterr().err == expected


def test_lines_that_fail_alike_are_listed_once_with_the_error_in_their_log(tmp_path):
    box = "╭─ Unrecognized options ─╮\n│ Unrecognized options: --x  │\n│ ─── │\n│ For full helptext, run │\n╰───╯"
    (tmp_path / "box").write_text(box)
    lines = ["cat box; exit 2", "echo 'error: no disk'; echo the end; exit 1", "cat box; exit 2"]
    lines += ["python -c 'int(\"x\")'", "kill -9 $$", "echo some words; exit 3", "kill -9 $$"]
    (tmp_path / "any.list").write_text("\n".join(lines))
    done = shell(ROOT / "scripts" / "sweep.sh", "--jobs", "1", tmp_path / "any.list", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == ""
    first, second, third, fourth, fifth, summary = done.stdout.splitlines()
    assert first == "line 1, 3 failed (2): Unrecognized options: --x"
    assert second == "line 2 failed (1): error: no disk"
    assert third.startswith("line 4 failed (1): ValueError: invalid literal")
    assert fourth == "line 5, 7 failed (137): Killed"
    assert (fifth, summary[:6]) == ("line 6 failed (3): some words", "0 done")


def test_lines_may_be_any_commands_comments_or_nothing(tmp_path):
    (tmp_path / "any.list").write_bytes(b"# two commands\r\n\r\ntrue\r\necho last > said")  # no newline at the end
    run = [ROOT / "scripts" / "sweep.sh", tmp_path / "any.list"]
    assert shell(*run, "--dry-run", cwd=tmp_path).stdout == "true\necho last > said\n"
    assert not (tmp_path / "said").exists()
    done = shell(*run, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "2 done, 0 running, 0 failed, 0 to do\n"), done
    assert (tmp_path / "said").read_text() == "last\n"
    (tmp_path / "said").unlink()
    assert shell(*run, cwd=tmp_path).returncode == 0 and not (tmp_path / "said").exists()  # all lines are done
    (tmp_path / "any.list").write_text("true\ntrue\ntrue\necho another list > said\n")
    assert shell(*run, "--status", cwd=tmp_path).stdout == "1 done, 0 running, 0 failed, 3 to do\n"
    assert shell(*run, cwd=tmp_path).returncode == 0 and (tmp_path / "said").read_text() == "another list\n"
    (tmp_path / "any.list").write_text("touch begun; while [ ! -e over ]; do sleep 0.1; done\n")
    other = subprocess.Popen(run, cwd=tmp_path, env=os.environ | {"PATH": PATH}, stdout=subprocess.DEVNULL)
    wait_for((tmp_path / "begun").exists, "the first sweep's line")
    second = shell(*run, cwd=tmp_path)
    assert second.returncode == 2 and "another sweep" in second.stderr
    (tmp_path / "over").touch()
    assert other.wait() == 0
    (tmp_path / "any.list").write_text("false --run-name run\n")
    (tmp_path / "runs" / "run").mkdir(parents=True)
    with open(tmp_path / "runs" / "run" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = shell(*run, cwd=tmp_path)  # another process makes the run of the only line
    assert (done.returncode, done.stdout) == (75, "0 done, 1 running, 0 failed, 0 to do\n"), done


def test_each_slot_has_a_gpu_of_those_that_may_be_used(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    all_run = "while [ $(ls said? | wc -l) -lt 4 ]; do sleep 0.1; done"
    (tmp_path / "any.list").write_text("".join(f"echo $CUDA_VISIBLE_DEVICES > said{i}; {all_run}\n" for i in range(4)))
    for given, expected, jobs in (("2,0", ["0", "0", "2", "2"], "2 at a time, 2 GPUs"), ("", [""] * 4, "0 GPUs")):
        settings = {"PATH": f"{tmp_path}:{PATH}", "CUDA_VISIBLE_DEVICES": given}
        command = [ROOT / "scripts" / "sweep.sh", tmp_path / "any.list"]
        assert jobs in shell(*command, "--dry-run", **settings).stderr
        done = shell(*command, "--jobs", "4", cwd=tmp_path, **settings)
        assert done.returncode == 0, done
        assert sorted((tmp_path / f"said{i}").read_text().strip() for i in range(4)) == expected
        shutil.rmtree(tmp_path / "any.list.logs")


@pytest.mark.parametrize("number", ["3", ""])
def test_a_job_without_its_line_fails(tmp_path, number):
    (tmp_path / "a.list").write_text("true\ntrue\n")
    done = shell("bash", ROOT / "scripts" / "sweep.sbatch", LIST=f"{tmp_path}/a.list", SLURM_ARRAY_TASK_ID=number)
    assert done.returncode == 2 and done.stderr.startswith("error: no line") and len(done.stderr.splitlines()) == 1


def test_an_offset_reaches_the_lines_beyond_the_largest_array(tmp_path):
    (tmp_path / "a.list").write_text("true\ntrue\necho the third line\n")
    settings = {"LIST": f"{tmp_path}/a.list", "OFFSET": "2", "SLURM_ARRAY_TASK_ID": "1"}
    done = shell("bash", ROOT / "scripts" / "sweep.sbatch", **settings)
    assert done.returncode == 0 and "line 3, restart 0" in done.stdout and "the third line" in done.stdout


def test_signals_reach_the_runs_and_the_list_goes_on_from_their_checkpoints(sweep, tmp_path):
    run = sweep(60_000, flags="--checkpoint-every 200")
    command = [ROOT / "scripts" / "sweep.sh", "--jobs", "2", tmp_path / "list.txt"]
    environment = os.environ | {"PATH": PATH, "PYTHONPATH": f"{ROOT}:{HELPERS}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path, "env": environment}

    def steps() -> list[int]:
        folders = [path.parent for path in (tmp_path / "runs").glob("*/checkpoint.pt")]
        return [checkpoint(folder)["progress"]["global_step"] for folder in folders]

    def heed():
        """Heed signals that this process may ignore, as background jobs do."""
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    def start_and_stop(number: int, last: list[int]) -> list[int]:
        """Return the steps of the runs' checkpoints. None may be earlier than `last`: no run begins anew."""
        started, seen = subprocess.Popen(command, **pipes, start_new_session=True, preexec_fn=heed), []
        wait_for(lambda: seen.append(steps()) or len(seen[-1]) == 2 and min(seen[-1]) > max(last), "two checkpoints")
        assert "2 running" in run("--status").stdout
        os.killpg(started.pid, number) if number == signal.SIGINT else os.kill(started.pid, number)
        stdout, stderr = started.communicate(timeout=600)
        assert stderr == "2 runs are left\n"  # bash adds nothing about its jobs
        assert started.returncode == 75 and "0 done, 0 running, 0 failed, 2 to do" in stdout
        assert min(min(found) for found in seen if found) >= min(last)
        return steps()

    start_and_stop(signal.SIGHUP, start_and_stop(signal.SIGINT, [200, 200]))


@pytest.mark.parametrize(
    "given", [["no-list"], ["--jobs", "none", "list.txt"], [], ["--stauts", "list.txt"], ["list.txt"] * 2]
)
def test_sweep_refuses_wrong_arguments_in_one_line(tmp_path, given):
    (tmp_path / "list.txt").write_text("true\n")
    done = shell(ROOT / "scripts" / "sweep.sh", *given, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")


WRONG = [
    (["11"], {"RUNS_DIR": "my runs"}, "no spaces"),
    (["11"], {"DATA": "my data"}, "no spaces"),
    (["1"], {"GAMES": "Pong Brekout"}, "Brekout is no Atari game"),
    (["1"], {"FLAGS": f"--run-name {200 * 'x'}"}, "FLAGS make the name of a run too long"),
    (["1"], {"SEEDS": "1 two"}, "not two"),
    (["1"], {"STEPS": "1e6"}, "not 1e6"),
    (["10"], {"WEIGHTS_EVERY": "often"}, "not often"),
    (["2"], {}, "no figure 2"),
    ([], {}, "no figure"),
    (["1", "--plto", "x"], {}, "--plto is no option"),
    (["1", "--plot"], {}, "needs a folder"),
]


@pytest.mark.parametrize("given, settings, words", WRONG)
def test_figure_refuses_wrong_arguments_in_one_line(given, settings, words):
    done = shell(FIGURE, *given, **settings)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: "), done
    assert words in done.stderr and len(done.stderr.splitlines()) == 1
