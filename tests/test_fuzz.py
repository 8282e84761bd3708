"""A few hostile inputs for every reader. `python tests/fuzz.py` reads 1,000 for each, and says more."""

import fuzz
import pytest

# a reader may warn about what it passes over
pytestmark = pytest.mark.filterwarnings("ignore")
COUNTS = {"texts": 200, "configs": 100, "modules": 60, "manifests": 60, "commands": 40}


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_hostile_inputs_are_read_or_refused_in_one_line(reader):
    found = dict(fuzz.read_all(reader, range(COUNTS[reader])))
    assert list(found) == list(range(COUNTS[reader]))
    assert {number: finding for number, finding in found.items() if finding} == {}


def test_what_a_reader_does_wrong_is_found(monkeypatch):
    def read(folder, draw):
        assert (folder / "made").read_text() == "x"
        (folder / "made").write_text("changed")
        number = next(numbers)
        if number == 1:
            raise ValueError(f"{folder} is wrong: expected something else")
        if number == 2:
            raise KeyError("shards")
        if number == 3:
            b"\xff".decode()
        while number == 4:
            pass

    numbers = iter(range(5))
    monkeypatch.setitem(fuzz.READERS, "faulty", (lambda folder: (folder / "made").write_text("x"), read))
    found = dict(fuzz.read_all("faulty", range(5), limit=1))
    assert found[0] is found[1] is None
    assert [found[i].partition(":")[0] for i in (2, 3, 4)] == ["KeyError", "UnicodeDecodeError", "Hang"]
