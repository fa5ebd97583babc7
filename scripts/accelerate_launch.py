"""``accelerate launch`` that passes signals on to its processes and ends with their exit status.

By itself it ends with 1 whatever the processes ended with, and USR1 kills it and leaves them behind. The launchers need
both: training answers a signal with a checkpoint and an exit status of its own (see launch.sh).
"""

import os
import signal
import sys

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def pass_on(signum: int, frame: object) -> None:
    for child in psutil.Process().children():
        child.send_signal(signum)


def main() -> int:
    """Run on every node with the same arguments: Slurm tells which of the nodes this is."""
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"  # torchrun's own reaction would hide the exit status
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its processes too: the launcher makes Ctrl-C a SIGTERM
    signal.signal(signal.SIGUSR1, pass_on)
    signal.signal(signal.SIGTERM, pass_on)
    arguments = ["--machine_rank", os.environ.get("SLURM_NODEID", "0"), *sys.argv[1:]]
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode  # as a shell counts signals
    return 0


if __name__ == "__main__":
    sys.exit(main())
