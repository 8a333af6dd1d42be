"""What tests ask of processes that they or others ended."""

import psutil


def runs(pid: int) -> bool:
    """Whether a process runs; one that ended and waits to be read does not, nor one that goes while it is asked."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
