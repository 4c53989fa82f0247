"""A process of its own for work whose memory must be its own."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class Alone:
    """`with Alone(name) as process: process.call(function, *arguments)`.

    Functions of modules, one after the other; what a module keeps in between stays in the process.
    A fresh interpreter, not a fork: torch's threads and a GPU's context do not survive one.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> Alone:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pipe.close()  # ends the process's loop
        if kind is not None:
            self._process.terminate()
        self._process.join()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def call(self, function: Callable[..., T], *arguments: object) -> T:
        """What `function` returns there.

        Raises:
            RuntimeError: it raised, or the process ended; the message says which and why.
        """
        try:
            self._pipe.send((function, arguments))
            answer, failure = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            raise RuntimeError(f"{self.name}: its process ended with {code}") from None
        if failure is not None:
            raise RuntimeError(f"{self.name}: {failure}")
        found: T = answer
        return found


def _serve(pipe: Connection) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        answer: Any = None
        failure = None
        try:
            answer = function(*arguments)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"[:2000]
        pipe.send((answer, failure))
        del answer
        gc.collect()  # what the call left behind is nobody's memory while others take their turns
