"""Test of sweep.sbatch on a real Slurm of one node: an array is signalled, requeued and resumed bit for bit."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from runs import HELPERS, ROOT, assert_same_outcome, checkpoint, wait_for

import dqn_softmoe

CONFIG = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""  # cred_expire: a requeued job waits until its credential expires, by default 120 s


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Start a Slurm cluster for this file, and yield a function that runs a command on it and returns its stdout."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"needs root and Slurm (apt-get install slurmctld slurmd slurm-client munge); no {missing}")
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().split(".")[0]
    for path in (folder, *list(folder.parents)[:3]):  # munged requires that its socket can be reached
        path.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir(mode=0o755)
    settings = {"folder": folder, "host": host, "cpus": os.cpu_count(), "ports": free_ports(2)}
    (folder / "slurm.conf").write_text(CONFIG.format(**settings))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(HELPERS)}

    def call(*command) -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
        return done.stdout.strip()

    paths = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid"}
    paths |= {"log-file": "munged.log", "seed-file": "munged.seed"}
    call("munged", *(f"--{name}={folder / path}" for name, path in paths.items()))
    for name in ("slurmctld", "slurmd"):
        call(name, "-c", "-f", folder / "slurm.conf")
    try:
        wait_for(lambda: call("sinfo", "-h", "-o", "%t") == "idle", "an idle node")
        yield call
    finally:
        for name in ("slurmd", "slurmctld", "munged"):
            if (folder / f"{name}.pid").exists():
                os.kill(int((folder / f"{name}.pid").read_text()), 15)


def test_an_array_is_signalled_requeued_and_resumed_bit_for_bit(slurm, tmp_path):
    flags = "--env-id pixel_game:PixelCatch-v0 --encoder nature --expert-hidden-dim 16 --learning-starts 200 --no-cuda "
    flags += "--buffer-size 1000 --iteration-steps 1000 --eval-episodes 2 --checkpoint-every 0 --resume auto"
    lines = [
        f"python dqn_softmoe.py {flags} --total-timesteps {steps} --seed {i} --runs-dir {tmp_path} --run-name run{i}"
        for i, steps in ((1, 6_000), (2, 600), (3, 600))
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    job = slurm(
        *("sbatch", "--parsable", "--array=1-3%2", "--mem=500", "--time=10", f"--output={tmp_path}/%a.log"),
        *(f"--export=ALL,LIST={tmp_path}/list.txt", "scripts/sweep.sbatch"),
    )
    first = tmp_path / "run1"
    wait_for(lambda: (first / "metrics.csv").exists() and "1000" in (first / "metrics.csv").read_text(), "a run")
    slurm("scancel", "--signal=USR1", "--batch", f"{job}_1")
    wait_for(lambda: "exit code 75" in (tmp_path / "1.log").read_text(), "a checkpoint")
    shutil.copytree(first, tmp_path / "copy")  # while the task waits in the queue
    wait_for(lambda: slurm("squeue", "-h", "-j", job) == "", "the end of the array")
    log = (tmp_path / "1.log").read_text()
    assert "restart 0" in log and "restart 1" in log and log.rstrip().endswith("exit code 0")
    step = checkpoint(tmp_path / "copy")["progress"]["global_step"]
    assert 1_000 <= step < 6_000
    args = dqn_softmoe.Args(env_id="pixel_game:PixelCatch-v0", encoder="nature", expert_hidden_dim=16, cuda=False)
    args = replace(args, learning_starts=200, buffer_size=1_000, iteration_steps=1_000, eval_episodes=2)
    dqn_softmoe.main(replace(args, total_timesteps=6_000, checkpoint_every=0, resume=str(tmp_path / "copy")))
    assert_same_outcome(first, tmp_path / "copy")
    assert all(checkpoint(tmp_path / f"run{seed}")["progress"]["global_step"] == 600 for seed in (2, 3))
