"""The heads of answers and choices give a packed batch the losses and gradients of the padded one."""

import pytest
import torch

from fastbert.model import presets
from fastbert.model.heads import MultipleChoice, QuestionAnswerer
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


@pytest.mark.parametrize("ends", [[6, 2, 4, 0, 3, 3], [6, -100, 4, -100, -100, 0]], ids=["all", "some"])
def test_an_answer_in_a_packed_batch(ends):
    model = QuestionAnswerer(presets.preset("bert-tiny")).eval()
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


def test_choices_in_a_packed_batch():
    model = MultipleChoice(presets.preset("bert-tiny")).eval()
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
