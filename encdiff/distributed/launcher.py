"""A launch from the command line itself: the processes of one machine, by the launcher that is behind torchrun."""

import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from encdiff.distributed.launch import ENDED


def launch(count: int, command: Sequence[str]) -> int:
    """Run `python *command` in so many processes, as `torchrun --standalone` does; returns what to exit with.

    A signal to this process goes to all of them, which have half a minute to end. Without torchrun's own report: what
    went wrong the processes have said.
    """
    logging.disable(logging.ERROR)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, max_restarts=0, monitor_interval=0.1, run_id=uuid.uuid4().hex,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config.logs_specs = DefaultLogsSpecs(log_dir=folder)  # else a folder is left behind
        ended = Path(folder) / "ended"
        os.environ[ENDED] = str(ended)
        try:
            elastic_launch(config, sys.executable)(*command)
        except SignalException as error:  # they saved and ended, or had not begun, or were killed
            if ended.is_file():
                return 0
            print("stopped before the processes had anything to save", file=sys.stderr)
            return 128 + int(error.sigval)
        except ChildFailedError as error:
            rank, first = error.get_first_failure()
            if first.exitcode < 0:
                print(f"error: process {rank} was ended by signal {-first.exitcode}", file=sys.stderr)
            return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0
