"""Ctrl-C and SIGTERM end the command line with one line and exit code 130 or 143, at any time. Imports little."""

import os
import signal


class Interrupted(BaseException):
    """A signal. Not a KeyboardInterrupt: click would catch that."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


def install():
    """SIGINT and SIGTERM raise Interrupted in the main thread. A second one, and one in an import, end the process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise)
        # MKL ends the process when a call of the system is interrupted while it is loaded. Not on Windows
        if hasattr(signal, "siginterrupt"):
            signal.siginterrupt(number, False)


def finish(number):
    """End the process at once: say why, with the cursor that a progress bar has hidden, and give the exit code."""
    shown = "\x1b[?25h" if os.isatty(2) else ""
    os.write(2, f"{shown}fastbert: error: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


def _raise(number, frame):
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, frame: finish(number))
    # an extension module that is being imported may turn an exception into any other
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            finish(number)
        frame = frame.f_back
    raise Interrupted(number)
