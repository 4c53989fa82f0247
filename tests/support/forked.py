"""A function run in a forked child, which may be killed, limited or deprived of its rights."""

from __future__ import annotations

import os
import select
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

NOBODY = 65534
DEADLINE_S = 300


@dataclass(frozen=True)
class Ended:
    """How a child ended: the signal that killed it (0: none) and the error that it met."""

    signal: int
    error: str  # name of the exception's class, "" if there was none
    said: str


def forked(function: Callable[[], object], *, powerless: bool = False) -> Ended:
    """Run `function` in a child; `powerless`: as a user to whom file permissions apply.

    What it imports must have been imported before.
    """
    return started(function, powerless=powerless)()


def started(function: Callable[[], object], *, powerless: bool = False) -> Callable[[], Ended]:
    """The same, but the child runs on; what comes back waits for it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        error, said = "", ""
        try:
            torch.set_num_threads(1)  # a fork has no OpenMP threads
            if powerless and os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            function()
        except BaseException as caught:
            error = type(caught).__name__
            said = f"{caught}\n{''.join(traceback.format_exception(caught))}"
        finally:
            os.write(writing, f"{error}\n{said}".encode()[:60000])
            os._exit(0)
    os.close(writing)

    def wait() -> Ended:
        with os.fdopen(reading, "rb") as pipe:
            if not select.select([pipe], [], [], DEADLINE_S)[0]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise TimeoutError(f"a forked child still ran after {DEADLINE_S} s")
            told = pipe.read().decode()
        _, status = os.waitpid(pid, 0)
        error, _, said = told.partition("\n")
        return Ended(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, error, said)

    return wait
