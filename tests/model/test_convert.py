"""fastbert convert: any directory in, today's form out."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_families import ONE_EACH, theirs_of
from tokenizers import Tokenizer, models

from fastbert import files
from fastbert.cli import main
from fastbert.model import hf_files
from fastbert.model.convert import convert


@pytest.mark.parametrize(
    ("case", "head"),
    [
        *((case, "Model") for case in ONE_EACH),
        ("bert", "ForTokenClassification"), ("electra", "ForMultipleChoice"), ("deberta", "ForQuestionAnswering"),
    ],
)  # fmt: skip
def test_every_tensor_survives(case, head, tmp_path):
    theirs = theirs_of(case, head)
    theirs.save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out")
    again, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in theirs.state_dict().items())


def test_an_old_pickled_checkpoint_on_the_command_line(tmp_path):
    theirs = theirs_of("bert", "ForMaskedLM")
    (tmp_path / "in").mkdir()
    theirs.config.architectures = ["BertForMaskedLM"]
    theirs.config.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
           for n, x in theirs.state_dict().items()}  # fmt: skip
    torch.save(old | {"bert.embeddings.position_ids": torch.arange(40)}, tmp_path / "in" / "pytorch_model.bin")

    with pytest.raises(ValueError, match="pass allow_pickle=True"):
        convert(tmp_path / "in", tmp_path / "out")
    command = [sys.executable, "-m", "fastbert", "convert", "--allow-pickle", tmp_path / "in", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "a MaskedLM of model type bert" in done.stdout and not done.stderr, done.stderr
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in theirs.state_dict().items())
    assert (tmp_path / "out" / "vocab.txt").exists()
    again = CliRunner().invoke(main, ["convert", "--allow-pickle", str(tmp_path / "in"), str(tmp_path / "out")])
    assert again.exit_code == 2 and "already has a model" in again.output


def test_bad_sources_are_one_clear_line(tmp_path):
    def refuses(message):
        with pytest.raises(ValueError, match=message) as caught:
            convert(tmp_path / "in", tmp_path / "out")
        assert "\n" not in str(caught.value)

    refuses("is no directory")
    theirs = theirs_of("bert", "ForMaskedLM")
    theirs.save_pretrained(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())

    def with_config(**changes):
        (tmp_path / "in" / "config.json").write_text(json.dumps(config | changes))

    with_config(model_type="llama")
    refuses("model_type 'llama': expected one of bert, .*roberta")
    with_config(architectures=["BertLMHeadModel"])
    refuses(r"names no known architecture: has \['BertLMHeadModel'\]")
    with_config()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(95))]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "in" / "tokenizer.json"))
    refuses("the tokenizer has 100 pieces: the model has a vocab_size of 99")
    (tmp_path / "in" / "tokenizer.json").unlink()
    path = tmp_path / "in" / "model.safetensors"
    save_file({name: x for name, x in load_file(path).items() if "layer.2.output.dense" not in name}, path)
    refuses("lacks 2 of the encoder's tensors, the first is bert.encoder.layer.2.output.dense")
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_not_stored_is_not_invented(tmp_path):
    theirs_of("bert", "Model").save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["BertForMaskedLM"]}))
    with pytest.raises(ValueError, match="lacks cls.predictions.bias"):
        convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_beside_a_run_or_left_in_halves(tmp_path, monkeypatch):
    theirs_of("bert", "ForMaskedLM").save_pretrained(tmp_path / "in")
    out = tmp_path / "out"
    with files.lock(out), pytest.raises(ValueError, match="out is in use by a live run"):
        convert(tmp_path / "in", out)
    whole = hf_files.save_file

    def full(tensors, path, **options):
        path.write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_files, "save_file", full)
    with pytest.raises(OSError, match="model.safetensors cannot be written: .*No space left") as caught:
        convert(tmp_path / "in", out)
    assert "\n" not in str(caught.value) and not [*out.glob("model*"), *out.glob("config*")]
    monkeypatch.setattr(hf_files, "save_file", whole)
    convert(tmp_path / "in", out)
    assert len({(out / name).stat().st_mode for name in ("model.safetensors", "config.json")}) == 1
