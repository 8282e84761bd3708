"""Some of the hostile inputs of hostile_runs.py: each is refused with one line."""

import dataclasses
import json
import random
import shutil
from itertools import islice

import hostile_runs
import pytest
from click.testing import CliRunner
from runs import run

from fastbert.cli import main
from fastbert.files import MANIFEST
from fastbert.training import checkpoint
from fastbert.training.options import kind
from fastbert.training.pretrain import PretrainConfig

NUMERIC = [field.name for field in dataclasses.fields(PretrainConfig) if kind(field) in (int, float)]


def assert_refused(arguments):
    result = CliRunner().invoke(main, arguments, prog_name="fastbert")
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, (arguments, result.exception)
    assert result.stderr.startswith("fastbert: error: ") and result.stderr.count("\n") == 1, (arguments, result.stderr)


@pytest.mark.parametrize("name", NUMERIC)
def test_absurd_numbers_are_refused_by_every_option(name):
    for number in ("nan", "inf", "1e400", "99999999999999999999", ""):
        option = f"--{name.replace('_', '-')}"
        result = CliRunner().invoke(
            main, ["pretrain", "--train-file", "nowhere", "--output-dir", "nowhere", f"{option}={number}"]
        )
        # a float may be large
        if (kind(PretrainConfig.__dataclass_fields__[name]), number) != (float, "99999999999999999999"):
            assert result.exit_code == 2 and option in result.stderr and result.stderr.count("\n") == 1, number


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_hostile_option_files(suffix, tmp_path):
    file = tmp_path / f"options{suffix}"
    for text in islice(hostile_runs.option_files(random.Random(0), NUMERIC), 60):
        file.write_text(text, encoding="utf-8")
        assert_refused(["pretrain", "--train-file", "nowhere", "--output-dir", "nowhere", "--config", str(file)])


def test_hostile_manifests(whole, tmp_path):
    directory = shutil.copytree(whole / "checkpoint-12", tmp_path / "checkpoint-12")
    for text in islice(hostile_runs.manifests(random.Random(0), whole / "checkpoint-12"), 100):
        (directory / MANIFEST).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError) as error:
            checkpoint.verify(directory)
        assert "\n" not in str(error.value)


def test_hostile_states(options, whole):
    directory = shutil.copytree(whole, options["output_dir"])
    state = checkpoint.read_state(directory / "checkpoint-12")
    for changed in islice(hostile_runs.states(random.Random(0), state), 30):
        (directory / "checkpoint-12" / checkpoint.STATE).write_text(json.dumps(changed))
        checkpoint.write_manifest(directory / "checkpoint-12")
        with pytest.raises(ValueError) as error:
            run(options, max_steps=14, resume=True)
        assert "\n" not in str(error.value), changed
