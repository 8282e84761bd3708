"""A hook of pytest: one CUDA error fails one test.

After an illegal access every later call of the process fails too. So a worker of xdist ends there, and xdist, which
counts the test as failed, starts another one.
"""

import os
import sys

import pytest


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    report = yield
    is_lost = call.excinfo is not None and "CUDA error" in str(call.excinfo.value)
    if is_lost and "PYTEST_XDIST_WORKER" in os.environ:
        item.config.pluginmanager.getplugin("capturemanager").suspend_global_capture(in_=True)
        print(f"{item.nodeid}: {report.longreprtext}", file=sys.stderr, flush=True)
        os._exit(1)
    return report
