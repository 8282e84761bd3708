"""fastbert convert: any directory in, today's form out."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_families import CASES, WITHOUT_CHOICE, theirs_of
from tokenizers import Tokenizer, models

from fastbert.model.convert import convert


def run(*arguments):
    done = subprocess.run([sys.executable, "-m", "fastbert", *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


@pytest.mark.parametrize("head", ["Model", "ForTokenClassification", "ForMultipleChoice"])
@pytest.mark.parametrize("case", ["bert", "xlm-roberta", "albert", "electra", "distilbert", "deberta", "deberta-v3"])
def test_every_tensor_survives(case, head, tmp_path):
    if head == "ForMultipleChoice" and CASES[case][0] in WITHOUT_CHOICE:
        head = "ForQuestionAnswering"
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

    code, _, error = run("convert", tmp_path / "in", tmp_path / "out")
    assert code == 2 and "pass allow_pickle=True" in error and "\n" not in error
    code, out, error = run("convert", "--allow-pickle", tmp_path / "in", tmp_path / "out")
    assert code == 0 and "a MaskedLM of model type bert" in out, error
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in theirs.state_dict().items())
    assert (tmp_path / "out" / "vocab.txt").exists()
    code, _, error = run("convert", "--allow-pickle", tmp_path / "in", tmp_path / "out")
    assert code == 2 and "already has a model" in error


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
    refuses("model_type 'llama': expected one of bert, roberta")
    with_config(architectures=["BertLMHeadModel"])
    refuses(r"names no known architecture: has \['BertLMHeadModel'\]")
    with_config(hidden_size=48)
    refuses("config.json wants")
    with_config(hidden_size=37)
    refuses("hidden_size 37 is not divisible by num_attention_heads 3")
    with_config(hidden_act="relu")
    refuses("hidden_act is 'relu'")
    with_config()
    path = tmp_path / "in" / "model.safetensors"
    good = load_file(path)
    path.write_bytes(path.read_bytes()[:-7])
    refuses("model.safetensors cannot be read")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(95))]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    save_file(good, path)
    tokenizer.save(str(tmp_path / "in" / "tokenizer.json"))
    refuses("the tokenizer has 100 pieces: the model has a vocab_size of 99")
    (tmp_path / "in" / "tokenizer.json").unlink()
    save_file({name: x for name, x in good.items() if "layer.2.output.dense" not in name}, path)
    refuses("lacks 2 of the encoder's tensors, the first is bert.encoder.layer.2.output.dense")
    assert not (tmp_path / "out").exists()
