"""The heads of answers and choices give a packed batch the losses and gradients of the padded one."""

import pytest
import torch
import torch.nn.functional as F

from fastbert.model import presets
from fastbert.model.heads import MultipleChoice, QuestionAnswerer
from fastbert.model.losses import ragged_classification
from fastbert.packing import pack

IDS = torch.randint(5, 99, (6, 7), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(7) < torch.tensor([7, 3, 5, 1, 7, 4])[:, None]).long()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def packed(**fields):
    batch, _ = pack(IDS, MASK)
    for name, value in fields.items():
        setattr(batch, name, value)
    return batch


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("ends", [[6, 2, 4, 0, 3, 3], [6, -100, 4, -100, -100, 0]], ids=["all", "some"])
def test_an_answer_in_a_packed_batch(ends, smoothing):
    model = QuestionAnswerer(presets.preset("bert-tiny")).eval()
    model.label_smoothing = smoothing
    starts, ends = torch.tensor([2, 1, 0, 0, -100, 3]), torch.tensor(ends)
    padded = model(IDS, MASK, start_positions=starts, end_positions=ends)
    batch = packed(targets=torch.stack((starts, ends), 1))
    output = model(batch)
    assert model.label_counts(batch) == {name: int(loss.count) for name, loss in padded.losses.items()}
    assert {name: loss.correct for name, loss in output.losses.items()} == {
        name: loss.correct for name, loss in padded.losses.items()
    }
    torch.testing.assert_close(output.loss, padded.loss)
    torch.testing.assert_close(gradients(model, output.loss), gradients(model, padded.loss), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.logits, torch.stack((padded.start_logits, padded.end_logits), -1)[MASK.bool()])
    assert not model(packed()).losses


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_choices_in_a_packed_batch(smoothing):
    model = MultipleChoice(presets.preset("bert-tiny")).eval()
    model.label_smoothing = smoothing
    labels = torch.tensor([1, 0])
    padded = model(IDS.view(2, 3, 7), MASK.view(2, 3, 7), labels=labels)
    batch = packed(targets=labels.repeat_interleave(3), cu_examples=torch.tensor([0, 3, 6], dtype=torch.int32))
    output = model(batch)
    assert model.label_counts(batch) == {"label": 2}
    torch.testing.assert_close(output.loss, padded.loss)
    torch.testing.assert_close(output.logits.view(2, 3), padded.logits)
    torch.testing.assert_close(gradients(model, output.loss), gradients(model, padded.loss), rtol=1e-4, atol=1e-6)


def test_examples_may_have_different_numbers_of_choices():
    model = MultipleChoice(presets.preset("bert-tiny")).eval()
    batch = packed(targets=torch.tensor([1, 1, 3, 3, 3, 3]), cu_examples=torch.tensor([0, 2, 6], dtype=torch.int32))
    output = model(batch)
    scores = output.logits[:, 0]
    expected = -(scores[:2].log_softmax(0)[1] + scores[2:].log_softmax(0)[3])
    torch.testing.assert_close(output.losses["label"].sum, expected)


def test_smoothing_is_over_the_labels_that_a_row_has():
    """As torch has it for each row alone; what fills up a short row takes no part, in its value or gradient."""
    rows = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (4, 1, 3, 2)]
    scores = torch.nn.utils.rnn.pad_sequence(rows, True, float("-inf")).requires_grad_()
    labels = torch.tensor([3, 0, -100, 1])
    found = ragged_classification(scores, labels, smoothing=0.2)
    known = [(row, label) for row, label in zip(rows, labels) if label >= 0]
    expected = sum(F.cross_entropy(row, label, label_smoothing=0.2) for row, label in known)
    torch.testing.assert_close(found.sum, expected)
    assert found.count == 3
    found.sum.backward()
    assert scores.grad.isfinite().all() and (scores.grad[2] == 0).all() and (scores.grad[1:2, 1:] == 0).all()
