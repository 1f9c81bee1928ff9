"""What the environment says of the launch that this process belongs to; loads no torch."""

import ctypes
import os
import signal
import sys

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # as torchrun sets them

ENDED = "ENCDIFF_ENDED"  # names a file that is made once the command has come to its end, or was stopped and has saved


def launched() -> bool:
    """Whether a launcher such as torchrun started this process, alone or with others."""
    return all(name in os.environ for name in NEEDED)


def launch_id() -> tuple[str, str] | None:
    """What is the same in every restart of one launch by the first machine's torchrun, and in no other launch; and what
    only this process of it has.

    None without torchrun: nothing else restarts processes, and what began this one may begin others on the same folder.
    """
    if not launched() or "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    agent, own = os.getppid(), os.getpid()
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {agent} {_born(agent)}", f"{own} {_born(own)}"


def end_with_launcher() -> None:
    """Be sent SIGTERM when torchrun ends, however it ends, rather than go on without it (Linux)."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _born(process: int) -> str:
    """When a process began, so that a number which is used again is not taken for it; empty where /proc is not."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
