"""Being asked to stop: SIGTERM and SIGUSR1 (a SLURM preemption, or its warning of the time limit) and Ctrl-C, heard
between two steps.
"""

import signal
import threading
from types import FrameType

PREEMPTED = 75  # "temporary failure; the user is invited to retry" (sysexits.h): job files ask for it
INTERRUPTED = 130  # as a shell says of Ctrl-C


class StopSignal:
    """`with StopSignal() as stop:` ... `stop.signals` are the signals that came, and `stop.received` is the last, or
    0."""

    def __init__(self, *numbers: int, interrupts: bool = False) -> None:
        """`numbers`: the signals to hear; by default SIGTERM, SIGUSR1 and SIGINT. `interrupts`: a second Ctrl-C stops
        at once, and signals that this process was started to ignore (nohup, background jobs of scripts) are heard too.
        """
        self.signals: list[int] = []
        self._numbers, self._interrupts = numbers or (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT), interrupts
        self._before: dict[int, signal._HANDLER] = {}

    @property
    def received(self) -> int:
        return self.signals[-1] if self.signals else 0

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python has no signals
            heard = [
                number for number in self._numbers if self._interrupts or signal.getsignal(number) != signal.SIG_IGN
            ]
            self._before = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if self._interrupts and number == signal.SIGINT and self.signals:
            raise KeyboardInterrupt
        self.signals.append(number)


def exit_code(number: int) -> int:
    """Of a command that saved its work because signal `number` came."""
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED
