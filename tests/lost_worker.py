"""A hook of pytest: one CUDA error fails one test.

After an illegal access every later call of the process fails too. So a worker of xdist ends there, and xdist, which
counts the test as failed, starts another one. Without xdist no further test runs.
"""

import os
import sys

import pytest

# torch's, and a Triton launch's
ERRORS = ("CUDA error", "Triton Error [CUDA]")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.excinfo is None or not any(error in str(call.excinfo.value) for error in ERRORS):
        return report
    if "PYTEST_XDIST_WORKER" in os.environ:
        item.config.pluginmanager.getplugin("capturemanager").suspend_global_capture(in_=True)
        print(f"{item.nodeid}: {report.longreprtext}", file=sys.stderr, flush=True)
        os._exit(1)
    item.session.shouldstop = "after a CUDA error every later test of the process would fail"
    return report
