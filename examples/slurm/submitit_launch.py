"""Submit a pretraining run with submitit (pip install submitit).

python examples/slurm/submitit_launch.py --nodes 2 --gpus 8 --hours 24 --partition gpu -- \
    vith14_in1k --data /imagenet/train --out runs/h14

Before the time limit the run saves its state and the job is queued again, as often as it takes.
`--cluster local` starts the processes on this machine.
"""

import argparse
import os
import signal
import subprocess
import sys

import submitit

from ijepa_zoo.cli import main

STOPPED_AND_SAVED = 75


class Pretraining:
    """One process of the job: `ijepa-zoo pretrain` with the environment variables of torchrun."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments

    def __call__(self) -> None:
        """Train, and queue the job again if it was stopped."""
        job = submitit.JobEnvironment()
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(job.global_rank), str(job.num_tasks)
        os.environ["LOCAL_RANK"] = str(job.local_rank)
        os.environ["LOCAL_WORLD_SIZE"] = str(job.num_tasks // job.num_nodes)
        os.environ["MASTER_ADDR"] = job.hostnames[0]
        os.environ["MASTER_PORT"] = str(20000 + int(job.raw_job_id) % 10000)
        # submitit would requeue the job at once, but the run must end its step and save first
        signal.signal(signal.SIGUSR2, lambda *_: signal.raise_signal(signal.SIGUSR1))
        status = main(["pretrain", "--quiet", *self.arguments])
        if status == STOPPED_AND_SAVED and job.global_rank == 0:
            subprocess.run(["scontrol", "requeue", job.job_id], check=True)
        elif status not in (0, STOPPED_AND_SAVED):
            sys.exit(status)


def submit() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="of each node")
    parser.add_argument("--cpus", type=int, default=10, help="for each GPU")
    parser.add_argument("--hours", type=float, default=24, help="time limit of a job")
    parser.add_argument("--partition", help="the cluster's default if left out")
    parser.add_argument("--logs", default="slurm_logs", help="folder for submitit's files")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm")
    parser.add_argument("pretrain", nargs="+", help="after --: arguments of ijepa-zoo pretrain")
    args = parser.parse_args()
    executor = submitit.AutoExecutor(args.logs, cluster=args.cluster)
    executor.update_parameters(
        name="ijepa",
        nodes=args.nodes,
        tasks_per_node=max(args.gpus, 1),
        gpus_per_node=args.gpus,
        cpus_per_task=args.cpus,
        timeout_min=round(60 * args.hours),
        slurm_signal_delay_s=300,
        **({"slurm_partition": args.partition} if args.partition else {}),
    )
    job = executor.submit(Pretraining(args.pretrain))
    print(f"job {job.job_id}, log {job.paths.stdout}")
    if args.cluster == "local":
        job.results()


if __name__ == "__main__":
    submit()
