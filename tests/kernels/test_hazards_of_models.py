"""What goes wrong in whole models, shown not to go wrong here. tests/README.md has the list."""

import re
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits, cu_seqlens_of
from transformers import BertConfig, BertForMaskedLM, DataCollatorWithFlattening

from fastbert.model.config import EncoderConfig
from fastbert.model.heads import MaskedLM
from fastbert.packing import Batch, pack
from fastbert.training.step_sums import accumulate

# numpy warns about elements that are not stored, and about the infinities under test
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TINY = EncoderConfig(
    vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=1, intermediate_size=40,
    max_position_embeddings=80, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
LENGTHS = [5, 1, 9]


@pytest.fixture
def model(impl, device):
    torch.manual_seed(1)
    model = MaskedLM(TINY).to(device)
    for parameter in model.parameters():
        # larger than BERT's first weights, so that differences show
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model


def padded(device, width=9, pad=0):
    """ids, mask and labels [3, width] of sequences of 5, 1 and 9 tokens; the padding holds `pad`."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 37, (3, 9), generator=generator)
    labels = torch.where(torch.rand(3, 9, generator=generator) < 0.4, ids, -100)
    mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    ids, labels = ids.where(mask, pad), labels.where(mask, -100)
    widen = lambda x, value: torch.nn.functional.pad(x, (0, width - 9), value=value).to(device)  # noqa: E731
    return dict(input_ids=widen(ids, pad), attention_mask=widen(mask.long(), 0), labels=widen(labels, -100))


def packed(device, slack=0, more_sequences=0, slack_id=0, more_picks=0):
    """The same as a Batch, filled up to a capacity."""
    inputs = padded("cpu")
    batch, _ = pack(**inputs)
    fill = lambda x, n, value: torch.cat((x, torch.full((n,), value, dtype=x.dtype)))  # noqa: E731
    T = int(batch.cu_seqlens[-1])
    return Batch(
        fill(batch.input_ids, slack, slack_id), fill(batch.position_ids, slack, slack_id % 7),
        fill(batch.token_type_ids, slack, slack_id % 2), fill(batch.cu_seqlens, more_sequences, T), batch.max_seqlen,
        fill(batch.labels, slack, -100), fill(batch.picks, more_picks, T + slack - 1),
    ).to(device)  # fmt: skip


def step(model, *args, **kwargs):
    """[loss sum, count, correct, every gradient]"""
    model.zero_grad(set_to_none=True)
    output = model(*args, **kwargs)
    output.loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    loss = output.losses["mlm"]
    return [loss.sum.detach(), loss.count, loss.correct, *gradients]


@pytest.fixture
def expected(impl, model, device, kept={}):  # noqa: B006
    """The step of the packed batch, made once for each implementation."""
    if impl not in kept:
        kept[impl] = [x.clone() for x in step(model, packed(device))]
    return kept[impl]


def test_padding_changes_nothing(model, expected, device):
    """Padding of any length and content, even where embeddings are NaN, gives the packed batch's bits."""
    assert_same_bits(step(model, **padded(device)), expected)
    with torch.no_grad():
        logits = model(**{k: v for k, v in padded(device).items() if k != "labels"}).logits
        model.encoder.embeddings.position.weight[9:] = float("nan")
    for width, pad in ((16, 0), (73, 36)):
        inputs = padded(device, width, pad)
        assert_same_bits(step(model, **inputs), expected)
        del inputs["labels"]
        with torch.no_grad():
            got = model(**inputs).logits
        assert torch.equal(got[:, :9], logits) and not got[:, 9:].any()


def test_rows_of_padding_alone(model, device):
    """Some rows or all of them: the result is that without them, and their logits are 0."""
    inputs = padded(device)
    for kept in ([0, 2], []):
        masked = {k: v.clone() for k, v in inputs.items()}
        gone = [b for b in range(3) if b not in kept]
        masked["attention_mask"][gone] = 0
        masked["labels"][gone] = -100
        got = step(model, **masked)
        assert all(torch.isfinite(x).all() for x in got)
        assert_same_bits(got, step(model, **{k: v[kept] for k, v in inputs.items()}))
        del masked["labels"]
        with torch.no_grad():
            assert not model(**masked).logits[gone].any()


def test_slack_and_empty_sequences(model, expected, device):
    """A batch filled up to a capacity: what fills it changes no bit, and filling it changes only rounding."""
    filled = step(model, packed(device, slack=4, more_sequences=3, slack_id=1, more_picks=2))
    assert_same_bits(filled, step(model, packed(device, slack=4, more_sequences=3, slack_id=30, more_picks=2)))
    assert_same_bits(filled[1:3], expected[1:3])
    for a, b in zip(filled, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_alone_and_in_a_batch(model, device):
    """A text's scores depend on its batch only in rounding: the matrix library may sum in another order."""
    inputs = padded(device)
    del inputs["labels"]
    with torch.no_grad():
        together = model(**inputs).logits
        for b, length in enumerate(LENGTHS):
            alone = model(inputs["input_ids"][b : b + 1, :length]).logits[0]
            torch.testing.assert_close(alone, together[b, :length], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)], ids=str)
def test_an_empty_batch(model, shape, device):
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    loss, count, correct, *gradients = step(model, ids, labels=torch.full_like(ids, -100))
    assert (loss.item(), count.item(), correct.item()) == (0.0, 0, 0)
    assert not any(gradient.any() for gradient in gradients)
    with torch.no_grad():
        assert model(ids).logits.shape == (*shape, 37)


def test_a_packed_batch_without_tokens(model, device):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    for sequences in (0, 2):
        batch = Batch(none, none, none, cu_seqlens_of([0] * sequences, device), 0, none, none)
        loss, count, correct, *gradients = step(model, batch)
        assert (loss.item(), count.item(), correct.item()) == (0.0, 0, 0)
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("picked", [0, 1, 15], ids=["none", "one", "all"])
def test_labels(picked, model, device):
    """Without a label the loss and the gradients are 0, padded and packed, where transformers gives NaN."""
    inputs, batch = padded(device), packed(device)
    batch.labels = torch.where(torch.arange(15, device=device) < picked, batch.input_ids, -100)
    batch.picks = (batch.labels != -100).nonzero()[:, 0]
    loss, count, _, *gradients = got = step(model, batch)
    assert count == picked and torch.isfinite(loss) and (loss == 0) == (picked == 0)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients) == (picked > 0)
    if picked == 0:
        assert_same_bits(got, step(model, **inputs | dict(labels=torch.full_like(inputs["labels"], -100))))


def one_by_one(batch):
    """The sequences of a batch as batches of one."""
    starts, parts = batch.cu_seqlens.tolist(), []
    for start, end in zip(starts, starts[1:]):
        rows, labels = slice(start, end), batch.labels[start:end]
        parts.append(Batch(
            batch.input_ids[rows], batch.position_ids[rows], batch.token_type_ids[rows],
            cu_seqlens_of([end - start], labels.device), end - start, labels, (labels != -100).nonzero()[:, 0],
        ))  # fmt: skip
    return parts


def test_accumulated_gradients_are_those_of_one_batch(model, device):
    """Micro-batches with different numbers of picks, one without: the sum is divided once, by the total."""
    batch = packed(device)
    batch.picks = torch.tensor([1, 3, 7, 8, 9, 14], device=device)
    batch.labels = torch.full_like(batch.labels, -100).index_copy(0, batch.picks, batch.input_ids[batch.picks])
    parts = one_by_one(batch)
    assert [len(part.picks) for part in parts] == [2, 0, 4]
    _, _, _, *whole = step(model, batch)
    model.zero_grad(set_to_none=True)
    accumulate(model, parts)
    largest = max(wanted.abs().max().item() for wanted in whole)
    for parameter, wanted in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=1e-6 * largest)


@pytest.fixture
def theirs():
    config = BertConfig(
        vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=80, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


def test_accumulation_in_transformers_inflates_the_gradient(theirs, tmp_path):
    """Its Trainer leaves the division to the model through `num_items_in_batch`, which BERT ignores: n micro-batches
    give n times the gradient of one batch. Ours give that of one batch (huggingface/transformers#47688)."""
    theirs.save_pretrained(tmp_path)
    ours = MaskedLM.from_pretrained(tmp_path)
    ids = torch.randint(1, 37, (4, 6))
    labels = torch.where(torch.arange(6) < 2, ids, -100)

    def norm(parameters):
        return torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item()

    theirs(ids, labels=labels).loss.backward()
    whole = norm(theirs.parameters())
    theirs.zero_grad()
    for b in range(4):
        theirs(ids[b : b + 1], labels=labels[b : b + 1], num_items_in_batch=torch.tensor(8)).loss.backward()
    assert norm(theirs.parameters()) == pytest.approx(4 * whole, rel=1e-3)

    accumulate(ours, [pack(ids[b : b + 1], labels=labels[b : b + 1])[0] for b in range(4)])
    assert norm(ours.parameters()) == pytest.approx(whole, rel=1e-5)


def test_flattening_in_transformers_loses_segments_and_labels(theirs, tmp_path):
    """Its collator drops token_type_ids and the first label of each sequence. Packing keeps both, and the model's
    scores are those of the padded batch."""
    examples = [
        {"input_ids": [3, 4, 5, 6], "token_type_ids": [0, 0, 1, 1], "labels": [3, -100, 5, -100]},
        {"input_ids": [7, 8], "token_type_ids": [0, 1], "labels": [7, -100]},
    ]
    flat = DataCollatorWithFlattening(return_tensors="pt")(examples)
    assert "token_type_ids" not in flat and flat["labels"].flatten().tolist() == [-100, -100, 5, -100, -100, -100]

    theirs.save_pretrained(tmp_path)
    ours = MaskedLM.from_pretrained(tmp_path)
    fill = lambda name, value: torch.tensor([(e[name] + [value] * 4)[:4] for e in examples])  # noqa: E731
    ids, segments, labels = fill("input_ids", 0), fill("token_type_ids", 0), fill("labels", -100)
    mask = (ids > 0).long()
    batch, _ = pack(ids, mask, segments, labels=labels)
    assert batch.token_type_ids.tolist() == [0, 0, 1, 1, 0, 1]
    assert batch.labels.tolist() == [3, -100, 5, -100, 7, -100]
    expected = theirs(ids, attention_mask=mask, token_type_ids=segments).logits[mask.bool()]
    torch.testing.assert_close(ours.logits(batch), expected, rtol=0, atol=1e-5)


def test_the_table_of_hazards_names_existing_tests():
    folder = Path(__file__).parents[1]
    named = re.findall(r"`((?:\w+/)?test_\w+\.py)::(\w+)`", (folder / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 50
    for file, test in named:
        assert f"def {test}(" in next(folder.rglob(file)).read_text(encoding="utf-8"), f"{file}::{test}"
