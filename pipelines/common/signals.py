"""Being asked to stop: SIGTERM and SIGUSR1 (a SLURM preemption, or its warning of the time limit) and Ctrl-C, heard between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType

PREEMPTED = 75  # "temporary failure; the user is invited to retry" (sysexits.h): job files ask for it
INTERRUPTED = 130  # as a shell says of Ctrl-C


class StopSignal:
    """`with StopSignal() as stop:` ... `stop.received` is the number of the signal that came, or 0. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python has no signals
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = number


def exit_code(number: int) -> int:
    """Of a command that saved its work because signal `number` came."""
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED
