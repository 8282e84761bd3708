"""Signals that arrive while the command line is importing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# sends itself a signal when a module is looked for
CODE = """
import os, sys
module, number = sys.argv[1], int(sys.argv[2])
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), number)
sys.meta_path.insert(0, Finder())
from fastbert.__main__ import run
sys.argv[1:] = ["pretrain", "--train-file", "nowhere", "--output-dir", "nowhere"]
run()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("module", ["fastbert.cli", "click", "torch", "numpy"])
def test_a_signal_in_an_import_is_one_line(module, number):
    command = [sys.executable, "-c", CODE, module, str(int(number))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr == f"fastbert: error: stopped by {number.name}\n" and not done.stdout


# waits in a call of the system that goes on after a signal, as calls into Rust do; says so from another thread
BLOCKED = """
import os, threading
from fastbert import interrupts
interrupts.PATIENCE = 0.1
interrupts.install()
timer = threading.Timer(1, print, ("waiting",), {"flush": True})
timer.daemon = True
timer.start()
os.read(os.pipe()[0], 1)
"""


def test_a_signal_during_a_long_call_into_a_library_is_one_line():
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 143 and errors == "fastbert: error: stopped by SIGTERM\n"
