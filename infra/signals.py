"""How a command ends early: Ctrl-C, and the signals by which systems end one."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator

STOP = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


def handled(numbers: Iterable[int]) -> list[int]:
    """Those of the signals that may be given a handler: none outside of the main thread, and not SIGHUP where
    nohup had it ignored."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [n for n in numbers if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Within it the signals by which systems end a command (a closed terminal's SIGHUP, Slurm's SIGUSR1) do
    what Ctrl-C does."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in handled(STOP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def clean_stop(processes: int) -> Iterator[list[int]]:
    """Within it Ctrl-C and the signals by which systems end a command (SIGTERM, a closed terminal's SIGHUP,
    Slurm's SIGUSR1) only join the list of signals, for a loop to look at and end by itself.

    A Ctrl-C after that ends the process at once. Not one of several `processes`: their launcher passes on
    what the terminal has sent them already, and ends them itself when it is asked again.
    """
    received: list[int] = []
    numbers = handled([*STOP, signal.SIGINT])
    if not numbers:  # outside of the main thread, where Python allows no handlers
        yield received
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def watch():  # in a thread, as Python's own handlers wait for the end of a backward pass
        with ours:
            for content in iter(lambda: ours.recv(1), b""):
                number = content[0]
                if number in numbers:
                    received.append(number)
                if processes == 1 and number == signal.SIGINT and len(received) > 1:
                    os._exit(130)

    threading.Thread(target=watch, daemon=True).start()
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    before_descriptor = signal.set_wakeup_fd(theirs.fileno())
    try:
        yield received
    finally:
        signal.set_wakeup_fd(before_descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        theirs.close()
