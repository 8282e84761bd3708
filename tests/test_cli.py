"""The command line: what it takes, what it prints, and that every error is one line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastbert.cli import main
from fastbert.data.tokenizer import load_tokenizer, save_tokenizer
from fastbert.files import lock
from fastbert.model.config import EncoderConfig
from fastbert.model.heads import MaskedLM
from fastbert.training import pretrain as script
from fastbert.training.options import kind

ROOT = Path(__file__).parent.parent


def call(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="fastbert")


def assert_one_line_error(result, *parts):
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("fastbert: error: ") and result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """text.txt, and a tokenizer and a model that the commands made and read."""
    place = tmp_path_factory.mktemp("cli")
    lines = [
        f"the {a} sees the {b} near the old {c}\n"
        for a in ("cat", "dog", "cow")
        for b in ("mill", "barn")
        for c in ("well", "oak")
    ]
    (place / "text.txt").write_text("\n".join(lines * 3))
    return place


@pytest.fixture(scope="module")
def model(place):
    result = call(
        "tokenizer", "train", "--train-file", place / "text.txt", "--output-dir", place / "tok", "--vocab_size", 60
    )
    assert result.exit_code == 0, result.output
    assert "60 pieces" in result.stdout
    config = EncoderConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=16, max_position_embeddings=16)  # fmt: skip
    MaskedLM(config).save_pretrained(place / "model")
    save_tokenizer(load_tokenizer(place / "tok"), place / "model")
    return place / "model"


@pytest.fixture
def given(monkeypatch):
    """The PretrainConfig that the pretrain command would run; nothing is run."""
    configs = []
    monkeypatch.setattr(script, "pretrain", lambda config: configs.append(config) or {"signal": None})
    return configs


BASICS = ("--train-file", "a.txt", "--output-dir", "out")


@pytest.mark.parametrize("spell", [str, lambda name: name.replace("_", "-")], ids=["underscores", "hyphens"])
def test_every_field_is_an_option_in_both_spellings(spell, given):
    values = {
        "choices": lambda f: f.metadata["choices"][-1],
        int: lambda f: 9,
        float: lambda f: 0.25,
        str: lambda f: "x",
    }
    arguments, expected = list(BASICS), {"train_file": ("a.txt",), "output_dir": "out"}
    for field in dataclasses.fields(script.PretrainConfig):
        if field.name in (*expected, "epochs", "max_minutes"):
            continue
        if kind(field) is bool:
            arguments.append(f"--{spell(field.name)}")
            expected[field.name] = True
            continue
        value = values["choices" if field.metadata["choices"] else kind(field)](field)
        arguments += [f"--{spell(field.name)}", value]
        expected[field.name] = (value,) if field.default == () else value
    result = call("pretrain", *arguments)
    assert result.exit_code == 0, result.output
    assert dataclasses.asdict(given[0]) == dataclasses.asdict(script.PretrainConfig(**expected))
    assert call("pretrain", "--help").stdout.count("default: 8192") == 1


def test_defaults_are_those_of_the_dataclass(given):
    assert call("pretrain", *BASICS).exit_code == 0
    assert given == [script.PretrainConfig(train_file="a.txt", output_dir="out")]


def test_an_option_for_files_takes_several_at_once(given):
    call("pretrain", "--train_file", "a.txt", "b.txt", "--eval-file=c.txt", "--train-file", "d", "--output-dir", "out")
    assert given[0].train_file == ("a.txt", "b.txt", "d") and given[0].eval_file == ("c.txt",)
    assert_one_line_error(call("pretrain", *BASICS, "--seed", "1", "2"), "2")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "train-file: a.txt\noutput_dir: out\nlearning-rate: 3e-4\nbf16: true\nepochs: 2\nseed: 5\n"),
        (
            "run.json",
            json.dumps(
                {"train_file": ["a.txt"], "output-dir": "out", "learning_rate": 3e-4, "bf16": True, "epochs": 2}
            ),
        ),
    ],
)
def test_a_file_gives_options_and_the_command_line_wins(name, text, given, tmp_path):
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    (tmp_path / name).write_text(text)
    assert call("pretrain", "--config", tmp_path / name, "--seed", 6, "--no-bf16").exit_code == 0
    expected = {"train_file": "a.txt", "output_dir": "out", "learning_rate": 3e-4, "epochs": 2.0, "seed": 6}
    assert given == [script.PretrainConfig(**expected)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"max_stepz": 3}', ["no option is called 'max_stepz'"]),
        ('{"seed": "five"}', ["'--seed': 'five' is not a valid integer"]),
        ('{"seed": 1.5}', ["'--seed': '1.5' is not a valid integer"]),
        ('{"seed": true}', ["'--seed': 'True' is not a valid integer"]),
        ('{"bf16": 1}', ["'--bf16' does not take a value"]),
        ('{"learning_rate": "fast"}', ["'--learning-rate': 'fast' is not a valid float"]),
        ('{"seed": [1, 2]}', ["'--seed': '[1, 2]' is not a valid integer"]),
        ('{"schedule": "steep"}', ["'--schedule': 'steep' is not one of"]),
        ("[1, 2]", ["holds a list"]),
        ('{"seed": ', ["cannot be read"]),
    ],
)
def test_a_wrong_file_is_one_line(text, parts, tmp_path):
    (tmp_path / "run.json").write_text(text)
    assert_one_line_error(call("pretrain", *BASICS, "--config", tmp_path / "run.json"), "run.json", *parts)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["pretrain"], "--train-file is missing"),
        (["pretrain", *BASICS], "no such file or folder: a.txt"),
        (["pretrain", *BASICS, "--learning-rate", "fast"], "'fast' is not a valid float"),
        (["pretrain", *BASICS, "--objective", "clm"], "'clm' is not one of"),
        (["pretrain", *BASICS, "--max-steps", "0"], "--max-steps is 0: expected at least 1"),
        (["pretrain", *BASICS, "--colour", "red"], "No such option"),
        (["pretrain", *BASICS, "--config", "none.yaml"], "none.yaml: no such file"),
        (["fly"], "No such command"),
        (["tokenizer", "train", "--train-file", "a.txt", "--output-dir", "x"], "no such file or folder: a.txt"),
        (["tokenizer", "train", "--output-dir", "x"], "--train-file"),
        (["prepare", "--train-file", "a.txt", "--tokenizer", "t", "--output-dir", "x"], "no tokenizer in t"),
        (["fill-mask", "--model", "none", "a [MASK]"], "no model in none"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, part):
    assert_one_line_error(call(*arguments), part)


def test_training_that_diverges_is_one_line_and_exit_code_1(monkeypatch):
    def diverge(config):
        raise FloatingPointError("training diverged")

    monkeypatch.setattr(script, "pretrain", diverge)
    result = call("pretrain", *BASICS)
    assert result.exit_code == 1 and result.stderr == "fastbert: error: training diverged\n"


@pytest.mark.parametrize(("signal", "code"), [(15, 143), (2, 130), (None, 0)])
def test_the_exit_code_names_the_signal(signal, code, monkeypatch):
    monkeypatch.setattr(script, "pretrain", lambda config: {"signal": signal})
    assert call("pretrain", *BASICS).exit_code == code


@pytest.mark.parametrize("folder", ["run", "run/generator"])
def test_a_tokenizer_is_not_written_into_a_live_run(folder, place, tmp_path):
    arguments = ["tokenizer", "train", "--train-file", place / "text.txt", "--vocab-size", 60, "--output-dir"]
    with lock(tmp_path / "run"):
        assert_one_line_error(call(*arguments, tmp_path / folder), "is in use by a live run")
    assert not list((tmp_path / "run").glob("**/*.json"))
    assert call(*arguments, tmp_path / folder).exit_code == 0
    # a directory of its own gets no lock
    assert call(*arguments, tmp_path / "own").exit_code == 0 and not (tmp_path / "own" / ".lock").exists()


def test_prepare_writes_shards(place, model):
    result = call(
        "prepare", "--train-file", place / "text.txt", "--tokenizer", place / "tok", "--output-dir", place / "shards"
    )
    assert result.exit_code == 0, result.output
    assert "in 36 documents" in result.stdout
    assert json.loads((place / "shards" / "manifest.json").read_text())["documents"] == 36


def test_fill_mask_prints_words_with_probabilities(model):
    result = call("fill-mask", "--model", model, "--top-k", 3, "the [MASK] sees the [MASK]")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("[MASK]")] == ["[MASK] 1", "[MASK] 2"] and len(lines) == 8
    shares = [float(line.split()[0].rstrip("%")) for line in lines if "%" in line]
    assert all(0 < share <= 100 for share in shares) and shares[:3] == sorted(shares[:3], reverse=True)


@pytest.mark.parametrize(
    ("text", "top_k", "part"),
    [
        ("no mask here", 5, "the text has no [MASK]"),
        ("a [MASK] " * 10, 5, "tokens: the model has 16 positions"),
        ("a [MASK]", 61, "top_k is 61: expected 1 to 60"),
        ("a [MASK]", 0, "top_k is 0"),
    ],
)
def test_fill_mask_refuses_texts_it_cannot_fill(text, top_k, part, model):
    assert_one_line_error(call("fill-mask", "--model", model, "--top-k", top_k, text), part)


def test_doctor_names_versions_and_implementations():
    lines = call("doctor").stdout.splitlines()
    for part in ("fastbert ", "torch ", "GPU: ", "Triton: ", "ops.attention: ", "ops.masked_cross_entropy: "):
        assert sum(line.startswith(part) for line in lines) == 1, part


def test_help_needs_no_torch():
    code = (
        "import sys; from fastbert.cli import main; main(['--help'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules or 'tokenizers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, "help imports torch" + done.stderr
    assert "pretrain" in done.stdout and "fill-mask" in done.stdout
    module = subprocess.run([sys.executable, "-m", "fastbert", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert module.returncode == 0 and module.stdout.startswith("fastbert ")
