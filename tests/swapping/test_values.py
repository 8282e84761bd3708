"""Through the swap: labels and ids that cannot be are errors, and torch.func and second derivatives work."""

import pytest
import torch
from small import V, assert_same_gradients, batch, gradients, tiny
from torch.func import functional_call, grad, vmap

import fastbert


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("number, place", [(-1, 1), (-1, -1), (V, 1), (2**40, 1)], ids=str)
def test_a_label_outside_the_vocabulary(number, place, train):
    """Also at padding. transformers raises, too. Taken as a loss of NaN, the Trainer would log 0 and go on."""
    model, inputs = tiny("BertForMaskedLM").train(train), batch()
    fastbert.swap(model)
    inputs["labels"][1, place] = number
    with pytest.raises(ValueError, match=f"labels hold {number}: expected 0 to {V - 1}, or -100 for none"):
        model(**inputs)


@pytest.mark.parametrize("name, number", [("input_ids", V), ("input_ids", -1), ("token_type_ids", 2)])
def test_an_id_outside_its_table(name, number):
    model, inputs = tiny("BertForMaskedLM"), batch()
    fastbert.swap(model)
    inputs[name] = inputs["input_ids"] * 0
    inputs[name][1, 1] = number
    with pytest.raises((ValueError, IndexError)):
        model(**inputs)


def test_labels_at_padding():
    """ELECTRA's discriminator leaves padding out of its loss, and the Trainer's number of labels counts it. A step of
    one batch is the original's; several cannot be, and are refused; with -100 at padding they are one batch."""
    model, inputs = tiny("ElectraForPreTraining"), batch()
    mask = inputs["attention_mask"]
    inputs["labels"] = inputs["input_ids"] % 2 * mask
    expected = gradients(model, inputs)
    fastbert.swap(model)
    assert_same_gradients(gradients(model, inputs | dict(num_items_in_batch=torch.tensor(mask.numel()))), expected)
    with pytest.raises(ValueError, match="labels hold numbers at padding.*expected -100 there"):
        gradients(model, {name: x[1:] for name, x in inputs.items()} | dict(num_items_in_batch=mask.numel()))
    inputs["labels"] = inputs["labels"].masked_fill(mask == 0, -100)
    model.zero_grad()
    for row in range(len(mask)):
        one = {name: x[row : row + 1] for name, x in inputs.items()}
        model(**one, num_items_in_batch=mask.sum()).loss.backward()
    assert_same_gradients({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "DistilBertForTokenClassification"])
def test_labels_of_tokens_that_a_stack_leaves_out(kind):
    model, inputs = tiny(kind), batch()
    inputs["labels"] = inputs["input_ids"] % 2
    fastbert.swap(model)
    with pytest.raises(ValueError, match="labels hold numbers at padding: expected -100 there"):
        model(**inputs)


# products of 2**20 multiply-adds and more
LARGE = dict(hidden_size=128, intermediate_size=512, attn_implementation="eager")


def assert_same_by_swap(gradients):
    """gradients(model), of a model and of the same model swapped."""
    model = tiny("BertForSequenceClassification", **LARGE)
    expected = gradients(model)
    fastbert.swap(model)
    got = gradients(model)
    assert got.keys() == expected.keys()
    largest = max(x.abs().max() for x in expected.values())
    for name, x in got.items():
        assert (x - expected[name]).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("per_text", [False, True], ids=["grad", "vmap of grad"])
def test_torch_func(per_text):
    ids = torch.randint(5, V, (4, 24))

    def gradients(model):
        values = {name: p.detach() for name, p in model.named_parameters()}
        loss = lambda values, ids: functional_call(model, values, (ids,)).logits.square().sum()  # noqa: E731
        return vmap(grad(loss), (None, 0))(values, ids[:, None]) if per_text else grad(loss)(values, ids)

    assert_same_by_swap(gradients)


def test_a_gradient_penalty():
    mask = torch.arange(24) < torch.tensor([24, 3, 20, 9])[:, None]
    ids = torch.randint(5, V, (4, 24))

    def gradients(model):
        model.zero_grad()
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        out = model(inputs_embeds=x, attention_mask=mask.long()).logits.sum()
        (first,) = torch.autograd.grad(out, x, create_graph=True)
        first.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    assert_same_by_swap(gradients)
