"""Programs that people run on their models, on swapped ones: HuggingFace's Trainer and pipelines, accelerate, PEFT,
sentence-transformers.

Each test runs the program on a swapped model and on the same model as it was. What is not installed is skipped.
"""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from small import SPECIALS, WORDS, S, V, assert_same_gradients, is_swapped, output, start, tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import fastbert

TEXTS = ["the cat sat on a mat .", "dog", "and then it ran far away from that dog", "it was the dog"]


def tokenizer():
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIALS + WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad", "unk", "cls", "sep", "mask")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=24, **{f"{n}_token": t for n, t in zip(names, SPECIALS)}
    )


def rows(kind, count=16):
    """Examples of unlike numbers of labels, padded to S; `note` is a column that no model takes."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for i in range(count):
        length = int(torch.randint(4, S + 1, (1,), generator=generator))
        mask = (torch.arange(S) < length).long()
        ids = torch.randint(5, V, (S,), generator=generator) * mask
        picked = (torch.rand(S, generator=generator) < 0.1 + 0.8 * (i % 4 == 0)) & mask.bool()
        picked[1] = True
        labels = {
            "MaskedLM": torch.where(picked, ids, -100),
            "TokenClassification": torch.where(picked, ids % 3, -100),
            "PreTraining": torch.where(mask.bool(), ids % 2, -100),
            "SequenceClassification": ids[1] % 3,
        }[kind.partition("For")[2]]
        made.append(dict(input_ids=ids, attention_mask=mask, labels=labels, note=torch.tensor(i)))
    return made


class Keeper(transformers.TrainerCallback):
    """Keeps the gradients of the first step."""

    gradients = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def arguments(folder, **options):
    defaults = dict(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=16, max_grad_norm=0.0, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    return transformers.TrainingArguments(**{**defaults, **options})


def one_step(model, data, folder, collator=None, **options):
    """(gradients of one optimizer step under the Trainer, its loss)."""
    keeper = Keeper()
    trainer = transformers.Trainer(
        model, arguments(folder, **options), train_dataset=data, callbacks=[keeper], data_collator=collator
    )
    return keeper.gradients or trainer.train() and keeper.gradients, trainer.state.log_history[-1]["train_loss"]


def norm(gradients):
    return torch.stack([x.square().sum() for x in gradients.values()]).sum().sqrt().item()


KINDS = ["BertForMaskedLM", "ModernBertForMaskedLM", "BertForTokenClassification", "BertForSequenceClassification"]


@pytest.mark.parametrize("kind", [*KINDS, "ElectraForPreTraining"])
def test_accumulated_gradients_are_those_of_one_batch(kind, tmp_path):
    pytest.importorskip("accelerate")
    data = rows(kind)
    expected, loss = one_step(tiny(kind), data, tmp_path)
    for accumulation in (1, 4):
        options = dict(per_device_train_batch_size=16 // accumulation, gradient_accumulation_steps=accumulation)
        stock, stock_loss = one_step(tiny(kind), data, tmp_path, **options)
        if not kind.startswith("ModernBert"):
            # what transformers does by itself; of unlike batches the means are weighted wrongly as well
            assert 0.7 * accumulation < norm(stock) / norm(expected) < 1.5 * accumulation
            assert stock_loss / loss == pytest.approx(accumulation, rel=0.2)
        model = tiny(kind)
        fastbert.swap(model)
        got, got_loss = one_step(model, data, tmp_path, **options)
        assert_same_gradients(got, expected)
        assert got_loss == pytest.approx(loss, abs=1e-5)


DISTRIBUTED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_swap_clients as clients
import fastbert
from fastbert.swapping import tokenwise
got = {}
for swaps in (False, True):
    model = clients.tiny()
    if swaps:
        fastbert.swap(model)
    options = dict(per_device_train_batch_size=8, ddp_backend="gloo")
    gradients, _ = clients.one_step(model, clients.rows("BertForMaskedLM"), sys.argv[2], **options)
    got[swaps] = {name.removeprefix("module."): x for name, x in gradients.items()}

# and each parameter cut in two by FSDP2
from torch.distributed.fsdp import fully_shard
model = clients.tiny()
fastbert.swap(model)
for layer in model.bert.encoder.layer:
    fully_shard(layer)
fully_shard(model)
# not taken for a user's code
assert tokenwise.own_code(model.bert.encoder) is None
half = slice(8 * torch.distributed.get_rank(), 8 * torch.distributed.get_rank() + 8)
rows = clients.rows("BertForMaskedLM")[half]
inputs = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask", "labels")}
count = (inputs["labels"] != -100).sum()
torch.distributed.all_reduce(count)
# FSDP divides the sum of gradients by the number of processes
model.train()(**inputs, num_items_in_batch=count / 2).loss.backward()
got["sharded"] = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
assert torch.distributed.get_world_size() == 2
if torch.distributed.get_rank() == 0:
    torch.save(got, sys.argv[3])
torch.distributed.destroy_process_group()
"""


def test_two_processes_make_the_gradient_of_one(tmp_path):
    pytest.importorskip("accelerate")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [
        start(DISTRIBUTED, Path(__file__).parent, tmp_path, tmp_path / "got.pt", RANK=str(rank), LOCAL_RANK=str(rank),
              WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        output(process)
    expected, _ = one_step(tiny(), rows("BertForMaskedLM"), tmp_path)
    got = torch.load(tmp_path / "got.pt")
    assert 1.6 < norm(got[False]) / norm(expected) < 2.5  # transformers by itself
    assert_same_gradients(got[True], expected)
    assert_same_gradients(got["sharded"], expected)


@pytest.mark.parametrize(
    "options", [dict(bf16=True), dict(gradient_checkpointing=True), dict(label_smoothing_factor=0.1),
                dict(torch_compile=True, torch_compile_backend="eager"), dict(remove_unused_columns=False)],
    ids=lambda options: "-".join(map(str, options)),
)  # fmt: skip
def test_flags(options, tmp_path, fresh_compiler):
    pytest.importorskip("accelerate")
    data = rows("BertForMaskedLM")
    if options.get("remove_unused_columns") is False:
        for row in data:
            del row["note"]
    # one batch, where transformers' loss is right
    uncompiled = {name: value for name, value in options.items() if not name.startswith("torch_compile")}
    expected, loss = one_step(tiny(num_hidden_layers=1), data, tmp_path, **uncompiled)
    model = tiny(num_hidden_layers=1)
    fastbert.swap(model)
    got, got_loss = one_step(model, data, tmp_path, **options)
    assert got_loss == pytest.approx(loss, abs=1e-2 if "bf16" in options else 1e-5)
    for name, gradient in expected.items():
        tolerance = 0.05 * gradient.abs().max() + 1e-3 if "bf16" in options else 1e-5
        assert (got[name] - gradient).abs().max() <= tolerance, name


def test_collators(tmp_path):
    """Masks drawn by HuggingFace's collator; batches that another one has flattened, without padding."""
    pytest.importorskip("accelerate")
    texts = [dict(tokenizer()(text)) for text in TEXTS * 4]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.5)
    results = []
    for swaps in (False, True):
        model = tiny()
        if swaps:
            fastbert.swap(model)
        results.append(one_step(model, texts, tmp_path, collator, seed=7))
    assert_same_gradients(results[1][0], results[0][0])

    labelled = [dict(input_ids=t["input_ids"], labels=[-100, *t["input_ids"][1:]]) for t in texts]
    padded = transformers.DataCollatorForTokenClassification(tokenizer())
    flat = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    with_mask = [dict(row, attention_mask=[1] * len(row["input_ids"])) for row in labelled]
    expected, _ = one_step(tiny(), with_mask, tmp_path, padded)
    model = tiny()
    fastbert.swap(model)
    for accumulation in (1, 2):
        options = dict(per_device_train_batch_size=16 // accumulation, gradient_accumulation_steps=accumulation)
        got, _ = one_step(model, labelled, tmp_path, flat, learning_rate=0.0, **options)
        assert_same_gradients(got, expected)


def metrics(prediction):
    scores, labels = prediction.predictions, prediction.label_ids
    scores = scores[0] if isinstance(scores, tuple) else scores
    assert prediction.inputs.shape == labels.shape and prediction.losses.shape[0] == len(labels)
    picked = labels != -100
    return dict(accuracy=float((scores.argmax(-1) == labels)[picked].mean()), total=float(np.abs(scores[picked]).sum()))


RELOAD = """
import sys, torch, transformers
saved = torch.load(sys.argv[2])
model = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1]).eval()
out = model(**saved["inputs"])
real = saved["inputs"]["attention_mask"].bool()
assert (out.logits - saved["logits"])[real].abs().max() < 1e-5
assert not any(name.startswith("fastbert") for name in sys.modules)
print(type(model).__module__)
"""


def test_train_evaluate_save_reload_without_fastbert_and_resume(tmp_path):
    pytest.importorskip("accelerate")
    data, held_out = rows("BertForMaskedLM"), rows("BertForMaskedLM", 24)[16:]

    def trainer(name, accumulation, swaps, **options):
        model = tiny(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1) if options else tiny()
        if swaps:
            fastbert.swap(model)
        settings = dict(
            max_steps=6, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
            learning_rate=5e-3, logging_strategy="steps", logging_steps=1, max_grad_norm=1.0, label_names=["labels"],
            include_for_metrics=["inputs", "loss"], per_device_eval_batch_size=3,
        )  # fmt: skip
        return transformers.Trainer(
            model, arguments(tmp_path / name, **{**settings, **options}), train_dataset=data, eval_dataset=held_out,
            compute_metrics=metrics,
        )  # fmt: skip

    # stock in whole batches, swapped in four pieces each: the same curve, the same evaluation
    stock, swapped = trainer("stock", 1, False), trainer("swapped", 4, True)
    curves = []
    for one in (stock, swapped):
        one.train()
        curves.append([entry["loss"] for entry in one.state.log_history if "loss" in entry])
    # two steps an epoch
    assert len(curves[0]) == 6 and sum(curves[0][-2:]) < sum(curves[0][:2]) - 0.05
    assert curves[1] == pytest.approx(curves[0], abs=2e-3)
    expected, got = stock.evaluate(), swapped.evaluate()
    for name in ("eval_loss", "eval_accuracy", "eval_total"):
        assert got[name] == pytest.approx(expected[name], rel=2e-3), name
    predictions = swapped.predict(held_out)
    assert predictions.predictions.shape == (8, S, V)

    model = swapped.model.eval()
    assert is_swapped(model)
    inputs = {name: torch.stack([row[name] for row in held_out]) for name in ("input_ids", "attention_mask")}
    torch.save(dict(inputs=inputs, logits=model(**inputs).logits.detach()), tmp_path / "expected.pt")
    swapped.save_model(str(tmp_path / "by-trainer"))
    model.save_pretrained(tmp_path / "by-model")
    for folder in ("by-trainer", "by-model"):
        assert '"BertForMaskedLM"' in (tmp_path / folder / "config.json").read_text()
        assert "fastbert" not in (tmp_path / folder / "config.json").read_text()
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "by-model").state_dict()
    assert all(torch.equal(x, again[name]) for name, x in model.state_dict().items())
    loaded = output(start(RELOAD, tmp_path / "by-trainer", tmp_path / "expected.pt"))
    assert loaded == "transformers.models.bert.modeling_bert"

    # interrupted and resumed, with dropout: the same weights to the bit
    whole = trainer("whole", 2, True, save_strategy="steps", save_steps=3)
    whole.train()
    rest = trainer("rest", 2, True, save_strategy="no")
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert rest.state.global_step == 6
    for (name, a), b in zip(whole.model.named_parameters(), rest.model.parameters()):
        assert torch.equal(a, b), name


FAMILIES = ["Roberta", "Electra", "MPNet", "DebertaV2", "Albert", "DistilBert"]


@pytest.mark.parametrize("kind", [*KINDS, *(f"{family}ForMaskedLM" for family in FAMILIES)])
def test_a_batch_without_labels_costs_nothing_and_spoils_nothing(kind):
    data = rows(kind)[:4]
    inputs = {name: torch.stack([row[name] for row in data]) for name in ("input_ids", "attention_mask", "labels")}
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert tiny(kind)(**inputs).loss.isnan()  # transformers by itself
    model = tiny(kind)
    fastbert.swap(model)
    for mode in (model.train, model.eval):
        mode()
        for options in ({}, dict(num_items_in_batch=torch.tensor(9)), dict(num_items_in_batch=0)):
            for return_dict in (True, False):
                model.zero_grad()
                loss = model(**inputs, **options, return_dict=return_dict)[0]
                loss.backward()
                assert loss == 0 and loss.dtype == torch.float32
                for name, p in model.named_parameters():
                    assert p.grad is None or not p.grad.any(), name


def assert_alike(got, expected):
    """Nested lists and dicts of words and numbers."""
    assert type(got) is type(expected)
    if isinstance(got, dict):
        assert got.keys() == expected.keys()
        got, expected = list(got.values()), list(expected.values())
    if isinstance(got, (list, tuple)):
        assert len(got) == len(expected)
        for a, b in zip(got, expected):
            assert_alike(a, b)
    elif isinstance(got, (float, np.floating)):
        assert got == pytest.approx(expected, abs=1e-5)
    else:
        assert got == expected


ASKED = {
    "fill-mask": [text + " [MASK]" for text in TEXTS],
    "text-classification": TEXTS,
    "token-classification": TEXTS,
    "feature-extraction": TEXTS,
    "zero-shot-classification": TEXTS,
}


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("fill-mask", "BertForMaskedLM"), ("fill-mask", "RobertaForMaskedLM"), ("fill-mask", "ModernBertForMaskedLM"),
        ("text-classification", "BertForSequenceClassification"),
        ("text-classification", "DistilBertForSequenceClassification"),
        ("token-classification", "BertForTokenClassification"),
        ("feature-extraction", "MPNetModel"), ("feature-extraction", "DebertaV2Model"),
        ("zero-shot-classification", "BertForSequenceClassification"),
    ],
)  # fmt: skip
def test_pipelines(task, kind):
    options = dict(candidate_labels=["cat", "dog"]) if task.startswith("zero") else {}
    model = tiny(kind).eval()
    if task.startswith("zero"):
        model.config.label2id = {"entailment": 0, "neutral": 1, "contradiction": 2}
    # two at a time are padded to one another; features of padding are returned too, which are none
    settings = dict(tokenizer=tokenizer(), batch_size=1 if task == "feature-extraction" else 2, device="cpu")
    pipe = transformers.pipeline(task, model=model, **settings)
    expected = pipe(ASKED[task], **options)
    report = fastbert.swap(model)
    report.raise_if_incomplete()
    assert_alike(pipe(ASKED[task], **options), expected)
    again = transformers.pipeline(task, model=model, **settings)
    assert_alike(again(ASKED[task], **options), expected)
