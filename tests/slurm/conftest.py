"""A SLURM of two nodes on this machine, and a run of two processes that is told to stop and goes on."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "srun")
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
KillWait=5
SlurmdTimeout=0
ReturnToService=2
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2
"""
RUN = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_steps: 24
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {{save_dir: {folder}, name: runs, version: whole, default_hp_metric: false}}
  callbacks:
    - class_path: lightning_modules.LastCheckpoint
      init_args: {{every_n_train_steps: 4}}
    - class_path: lightning_modules.ExportModel
    - class_path: trace.Trace
      init_args: {{folder: {folder}/trace-{name}, delay: {delay}}}
model:
  model: {{vocab_size: 64, d_model: 16, num_layers: 1, num_heads: 2, chunk_size: 4, max_seq_len: 16}}
  global_batch_size: 8
data:
  class_path: datamodules.tokens.TokenDataModule
  init_args: {{path: {data}, seq_len: 16, batch_size: 2}}
"""


def wait_for(what: Callable[[], Any], seconds: float = 60, say: Callable[[], str] = str) -> Any:
    """What `what` gives once it is true."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"not within {seconds} s: {say()}"
        time.sleep(0.2)
    return found


class Runs:
    """Runs of one small config in a folder: how they go, and where they end."""

    root, wait_for = ROOT, staticmethod(wait_for)

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        tools = folder / "bin"
        tools.mkdir()
        (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (tools / "python").chmod(0o755)
        own = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(Path(__file__).parent)}
        self.environment = os.environ | own | {"OMP_NUM_THREADS": "1"}

    def options(self, name: str, delay: float = 0.3) -> list[str]:
        """Of `cli.py fit`; every run leaves its own trace, and its last rank is behind."""
        config = self.folder / f"{name}.yaml"
        config.write_text(RUN.format(folder=self.folder, data=self.data, name=name, delay=delay))
        return ["--config", str(config)]

    def trace(self, name: str, rank: int) -> list[tuple[int, int, int]]:
        """Step, process and sum of tokens of each micro batch so far."""
        file = self.folder / f"trace-{name}" / str(rank)
        lines = file.read_text().splitlines() if file.exists() else []
        return [tuple(map(int, line.split())) for line in lines]  # type: ignore[misc]

    def wait_for_step(self, name: str, step: int) -> None:
        """Wait until rank 0 has made an optimiser step."""
        wait_for(lambda: self.trace(name, 0)[-1:] >= [(step,)], 120, self.logs)

    def hurry(self, name: str) -> None:
        """Nothing more is going to interrupt the run: no rank need be behind any longer."""
        (self.folder / f"trace-{name}" / "hurry").touch()

    def logs(self) -> str:
        """What the jobs have printed."""
        return "\n".join(file.read_text() for file in self.folder.glob("*.log"))

    def torchrun(self, name: str, delay: float = 0.3) -> subprocess.Popen[str]:
        """Two processes that meet over gloo."""
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            "cli.py", "fit", *self.options(name, delay), "--trainer.devices", "2",
            "--trainer.logger.init_args.version", name, "--ckpt_path", "last",
        ]  # fmt: skip
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def assert_same(self, name: str) -> None:
        """The run has ended with the weights of the uninterrupted one."""
        whole = self.weights("whole")
        for key, x in self.weights(name).items():
            torch.testing.assert_close(x, whole[key], rtol=0, atol=0, msg=key)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """In the last checkpoint, which is that of the last step."""
        checkpoint = torch.load(self.folder / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 24
        return checkpoint["state_dict"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, random_shards: Path) -> Runs:
    """With the run "whole", which nothing interrupts."""
    runs = Runs(tmp_path_factory.mktemp("runs"), random_shards)
    out, _ = (whole := runs.torchrun("whole", delay=0)).communicate(timeout=120)
    assert whole.returncode == 0, out
    return runs


class Slurm:
    """Two nodes, n1 and n2, of two CPUs each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, []
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start the daemons, and wait for the nodes."""
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [held.getsockname()[1] for held in sockets]
        conf = SLURM_CONF.format(host=socket.gethostname(), folder=self.folder, ports=ports)
        (self.folder / "slurm.conf").write_text(conf)
        for held in sockets:
            held.close()
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        wait_for((self.folder / "munge.socket").exists, say=self.logs)
        self._daemon("slurmctld", "-D", "-c", "-f", self.environment["SLURM_CONF"])
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", node)
        wait_for(lambda: self("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() == "2", say=self.logs)

    def stop(self) -> None:
        """End all jobs and daemons."""
        if len(self.daemons) == 4:
            self("scancel", "--full", "--signal=KILL", "--user=root", check=False)
            self("scancel", "--user=root", check=False)
            wait_for(lambda: not self("squeue", "--noheader", check=False), 30, self.logs)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def __call__(self, *command: str, check: bool = True, env: dict[str, str] | None = None) -> str:
        """Run a command of Slurm's and give what it prints."""
        done = subprocess.run(
            command, cwd=ROOT, env=(env or dict(os.environ)) | self.environment,
            text=True, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, script: str, *args: str, options: list[str], env: dict[str, str]) -> str:
        """`sbatch` one of our scripts; gives the job's number."""
        path = f"configs/slurm/{script}.sbatch"
        return self("sbatch", "--parsable", *options, path, *args, env=env).strip()

    def restarts(self, job: str) -> int:
        """How often a job was requeued."""
        return int(self("scontrol", "show", "job", job).split("Restarts=")[1].split()[0])

    def wait_for_restart(self, job: str, number: int, seconds: float = 30) -> None:
        """Wait until a job has been requeued so many times."""
        wait_for(lambda: self.restarts(job) == number, seconds, self.logs)

    def wait_for_end(self, job: str) -> set[str]:
        """How a job, or the tasks of an array, ended, once nothing of it runs."""

        def ended() -> set[str]:
            words = self("scontrol", "show", "job", job).split()
            states = {word.removeprefix("JobState=") for word in words if word.startswith("JobState=")}
            return set() if states & {"PENDING", "RUNNING", "COMPLETING"} else states

        wait_for(lambda: not self("squeue", "--noheader", f"--jobs={job}"), 300, self.logs)
        return wait_for(ended, 30, self.logs)

    def logs(self) -> str:
        """What the daemons said last."""
        return "\n".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in self.folder.glob("*.log"))

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{len(self.daemons)}-{command[0]}.log").open("w") as log:
            self.daemons.append(subprocess.Popen(command, stdout=log, stderr=log))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Started for the tests of a module."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [command for command in COMMANDS if shutil.which(command, path=path) is None]
    if missing:
        pytest.skip(f"there is no Slurm here: {', '.join(missing)} not found; .ci/run installs it on Debian")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path)
        slurm = Slurm(tmp_path_factory.mktemp("slurm"))
        try:
            slurm.start()
            yield slurm
        finally:
            slurm.stop()
