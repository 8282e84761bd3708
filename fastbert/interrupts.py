"""Ctrl-C and SIGTERM end the command line with one line and exit code 130 or 143, at any time. Imports little."""

import os
import signal
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# seconds that a call into a library may go on after a signal
PATIENCE = 2


class Interrupted(BaseException):
    """A signal. Not a KeyboardInterrupt: click would catch that."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


def install():
    """SIGINT and SIGTERM raise Interrupted in the main thread. A second one, and one in an import, end the process."""
    heard = threading.Event()

    def handle(number, frame):
        heard.set()
        for each in SIGNALS:
            signal.signal(each, lambda number, frame: finish(number))
        # an extension module that is being imported may turn an exception into any other
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                finish(number)
            frame = frame.f_back
        raise Interrupted(number)

    for number in SIGNALS:
        signal.signal(number, handle)
    if os.name != "nt":
        for number in SIGNALS:
            # MKL ends the process when a call of the system is interrupted while it is loaded
            signal.siginterrupt(number, False)
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(read, heard), daemon=True).start()


def _watch(read, heard):
    """End the process after a signal that Python cannot handle, as while a tokenizer is trained in Rust."""
    while True:
        number = os.read(read, 1)[0]
        if number in SIGNALS and not heard.wait(PATIENCE):
            finish(number)


def finish(number):
    """End the process at once: say why, with the cursor that a progress bar has hidden, and give the exit code."""
    shown = "\x1b[?25h" if os.isatty(2) else ""
    os.write(2, f"{shown}fastbert: error: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)
