import pytest
from helpers import PLAIN

from fastbert import ops


@pytest.fixture(params=["triton", PLAIN])
def impl(request, monkeypatch):
    monkeypatch.setattr(ops, "IMPL", request.param)
    return request.param
