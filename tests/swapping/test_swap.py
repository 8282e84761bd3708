"""The swap against the model that it was: values, every gradient, everything a caller may ask for; and the report.

Every family of test_families.py, with its odd sizes. What people do with a model besides calling it stands in
test_swap_models.py, the programs that they use it in in test_swap_clients.py.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from small import assert_close
from test_families import LACKS, MASKS, SWAPPED, B, S, mask_of, theirs_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastbert
from fastbert import ops
from fastbert.swapping import stacks, steps

HEADS = ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"]
# transformers' own models know no other
EAGER = {"Deberta", "DebertaV2", "MPNet", "MegatronBert"}


def pair_of(case, head="ForMaskedLM", impl="sdpa", switches=None, **changes):
    """(the model as it was, the same swapped, the report)."""
    model = theirs_of(case, head, **changes)
    if SWAPPED[case][0] not in EAGER:
        model.set_attn_implementation(impl)
    swapped = copy.deepcopy(model)
    return model, swapped, fastbert.swap(swapped, **(switches or {}))


def inputs_of(model, kind):
    mask = mask_of(kind, empty=False)
    config = model.config
    ids = torch.randint(10, 99, (B, S)).masked_fill(mask == 0, config.pad_token_id)
    inputs = dict(input_ids=ids, attention_mask=mask)
    if (getattr(config, "type_vocab_size", 0) or 0) > 1 and config.model_type != "mpnet":
        inputs["token_type_ids"] = torch.randint(0, config.type_vocab_size, (B, S))
    return inputs


def labels_of(inputs):
    picked = (torch.rand(B, S) < 0.3) & inputs["attention_mask"].bool()
    return torch.where(picked, inputs["input_ids"], -100)


def assert_gradients_equal(swapped, model):
    expected = dict(model.named_parameters())
    for name, parameter in swapped.named_parameters():
        own, theirs = (torch.zeros_like(p) if p.grad is None else p.grad for p in (parameter, expected[name]))
        assert (own - theirs).abs().max() < 1e-5 * max(1.0, theirs.abs().max().item()), name


def loss_of(model, inputs, **more):
    loss = model(**inputs, **more).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("case", SWAPPED)
def test_values_and_gradients(case, kind):
    impl = "eager" if kind in ("left", "full") else "sdpa"
    model, swapped, _ = pair_of(case, impl=impl)
    inputs = inputs_of(model, kind)
    real = inputs["attention_mask"].bool()
    got, expected = swapped(**inputs, output_hidden_states=True), model(**inputs, output_hidden_states=True)
    assert_close(got.logits, expected.logits, real)
    assert len(got.hidden_states) == len(expected.hidden_states)
    for ours, theirs in zip(got.hidden_states, expected.hidden_states):
        assert_close(ours, theirs, real)
    assert_close(swapped.base_model(**inputs)[0], model.base_model(**inputs)[0], real)
    labels = labels_of(inputs)
    swapped.train(), model.train()
    assert_close(loss_of(swapped, inputs, labels=labels), loss_of(model, inputs, labels=labels))
    assert_gradients_equal(swapped, model)
    assert swapped(**inputs, labels=labels).logits is None
    swapped.eval(), model.eval()
    got, expected = swapped(**inputs, labels=labels), model(**inputs, labels=labels)
    assert_close(got.loss, expected.loss)
    assert_close(got.logits, expected.logits, real)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", SWAPPED)
def test_heads(case, head):
    if head in LACKS.get(SWAPPED[case][0], ()):
        pytest.skip("transformers has no such class")
    model, swapped, _ = pair_of(case, head)
    # padding that is left out, and padding that the original code sees
    for kind in ("right", "left"):
        model.zero_grad(), swapped.zero_grad()
        inputs = inputs_of(model, kind)
        real = inputs["attention_mask"].bool()
        where, more = None, {"labels": torch.randint(0, 2, (B,))}
        if head == "ForTokenClassification":
            where, more = real, {"labels": torch.where(real, torch.randint(0, 2, (B, S)), -100)}
        if head == "ForQuestionAnswering":
            # scores are compared at padding, too, which the loss goes over; without padding the ops run
            if kind == "left":
                inputs["attention_mask"] = torch.ones_like(real).long()
            more = dict(start_positions=torch.randint(0, S, (B,)), end_positions=torch.randint(0, S, (B,)))
        if head == "ForMultipleChoice":
            inputs = {name: x[:6].view(3, 2, S) for name, x in inputs.items()}
            more = {"labels": torch.tensor([0, 1, 1])}
        got, expected = swapped(**inputs, **more), model(**inputs, **more)
        for name in ("start_logits", "end_logits") if head == "ForQuestionAnswering" else ("logits",):
            assert_close(got[name], expected[name], where)
        assert_close(got.loss, expected.loss)
        got.loss.backward(), expected.loss.backward()
        assert_gradients_equal(swapped, model)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ["bert", "albert"])
def test_pretraining_heads(case, training):
    model, swapped, _ = pair_of(case, "ForPreTraining", classifier_dropout_prob=0.0)
    inputs = inputs_of(model, "right")
    pairs = {"bert": "next_sentence_label", "albert": "sentence_order_label"}[case]
    more = {"labels": labels_of(inputs), pairs: torch.randint(0, 2, (B,))}
    model.train(training), swapped.train(training)
    got, expected = swapped(**inputs, **more), model(**inputs, **more)
    assert type(got) is type(expected)
    assert (got.prediction_logits is None) == training
    assert_close(got.loss, expected.loss)
    got.loss.backward(), expected.loss.backward()
    assert_gradients_equal(swapped, model)
    # one of the two alone gives no loss there either
    assert swapped(**inputs, labels=more["labels"]).loss is None
    # two halves of a step weigh as the whole does, as far as picked tokens go
    halves = [{name: x[part] for name, x in {**inputs, **more}.items()} for part in (slice(0, 3), slice(3, B))]
    count = (more["labels"] != -100).sum()
    assert sum(swapped(**half, num_items_in_batch=count).loss for half in halves).isfinite()


@pytest.mark.parametrize("case", ["bert", "roberta", "albert", "distilbert", "deberta", "mpnet", "modernbert", "gte"])
def test_other_ways_to_call(case):
    model, swapped, _ = pair_of(case, impl="eager")
    inputs = inputs_of(model, "right")
    mask = inputs["attention_mask"]
    real = mask.bool()
    ids = inputs["input_ids"]
    expected = model(**inputs)
    # by position, as a tuple, by embeddings, without a mask
    assert_close(swapped(ids, mask, return_dict=False)[0], model(ids, mask, return_dict=False)[0], real)
    assert len(swapped(ids, mask, return_dict=False)) == len(model(ids, mask, return_dict=False))
    embedded = model.get_input_embeddings()(ids).detach()
    arguments = dict(inputs_embeds=embedded, attention_mask=mask)
    assert_close(swapped(**arguments).logits, model(**arguments).logits, real)
    assert_close(swapped(ids).logits, model(ids).logits)
    with torch.inference_mode():
        assert_close(swapped(**inputs).logits, expected.logits.detach(), real)
    # positions of one's own
    if case not in ("deberta", "mpnet"):
        positions = torch.randint(2, 38, (B, S))
        got, wanted = swapped(**inputs, position_ids=positions), model(**inputs, position_ids=positions)
        assert_close(got.logits, wanted.logits, real)
    # attention weights: as ever
    got, wanted = swapped(**inputs, output_attentions=True), model(**inputs, output_attentions=True)
    assert len(got.attentions) == len(wanted.attentions) > 0
    for ours, theirs in zip(got.attentions, wanted.attentions):
        assert_close(ours, theirs)


@pytest.mark.parametrize("case, impl", [("bert", "sdpa"), ("bert", "eager"), ("modernbert", "sdpa")])
def test_masks_of_more_dimensions(case, impl):
    model, swapped, _ = pair_of(case, impl=impl)
    inputs = inputs_of(model, "right")
    real = inputs.pop("attention_mask").bool()
    least = torch.finfo(torch.float32).min
    padding = real[:, None, None]
    blocks = (torch.arange(S) < 6)[:, None] == (torch.arange(S) < 6)
    whole = blocks & padding
    whole[..., 0] = True  # a row that sees nothing is NaN under sdpa
    for seen in (padding, padding.expand(B, 1, S, S), whole):
        # eager attention adds bools, too
        masks = [seen] if impl == "sdpa" else [torch.zeros(seen.shape).masked_fill(~seen, least), seen]
        for mask in masks:
            got, expected = (m(**inputs, attention_mask=mask).logits for m in (swapped, model))
            assert_close(got, expected, real)


def test_what_a_mask_says():
    def tokens(mask, by_distance=True):
        layout = stacks.layout_under(mask, torch.zeros(2, 3, 4), {}, by_distance=by_distance)
        return None if layout is None else (layout.cu_seqlens.tolist(), layout.indices.tolist())

    real = torch.tensor([[1, 1, 0], [1, 1, 1]])
    floats = torch.zeros(2, 1, 1, 3).masked_fill(real[:, None, None] == 0, torch.finfo(torch.float32).min)
    for mask in (real, real.bool(), real.float(), real[:, None].expand(2, 3, 3), real[:, None, None].bool(), floats):
        assert tokens(mask) == ([0, 2, 5], [0, 1, 3, 4, 5])
    slope = floats.clone()
    slope[1, 0, 0, 1] = -3.0
    causal = torch.ones(2, 1, 3, 3).tril().bool()
    by_head = real[:, None, None].bool().expand(2, 4, 3, 3)
    left, holes = torch.tensor([[0, 1, 1], [1, 1, 1]]), torch.tensor([[1, 0, 1], [1, 1, 1]])
    for mask in (slope, causal, by_head, real[:, :2], {"full_attention": real}, left, real * 0):
        assert tokens(mask, by_distance=False) is None
    assert tokens(holes, by_distance=False) == ([0, 2, 5], [0, 2, 3, 4, 5])
    assert tokens(holes) is None


@pytest.mark.parametrize("case", ["bert", "albert", "distilbert", "deberta", "deberta-v3", "mpnet", "modernbert"])
def test_dropout_is_drawn_from_torchs_generator(case):
    dropouts = {
        "distilbert": dict(dropout=0.3, attention_dropout=0.3),
        "modernbert": dict(embedding_dropout=0.3, mlp_dropout=0.3, attention_dropout=0.3),
    }.get(case, dict(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3))
    model, swapped, _ = pair_of(case, **dropouts)
    swapped.train(), model.train()
    inputs = inputs_of(model, "right")
    labels = labels_of(inputs)

    def step(model, seed):
        model.zero_grad()
        torch.manual_seed(seed)
        loss = loss_of(model, inputs, labels=labels)
        return loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    first, again, other = step(swapped, 1), step(swapped, 1), step(swapped, 2)
    assert torch.equal(first[0], again[0]) and all(map(torch.equal, first[1], again[1]))
    assert not torch.equal(first[0], other[0])
    # the same distribution of losses
    seeds = range(25)
    ours, theirs = (torch.stack([step(m, seed)[0] for seed in seeds]) for m in (swapped, model))
    spread = (ours.var() / len(seeds) + theirs.var() / len(seeds)).sqrt()
    assert (ours.mean() - theirs.mean()).abs() < 4 * spread
    assert 0.4 < ours.std() / theirs.std() < 2.5
    if model.supports_gradient_checkpointing:
        # DeBERTa v3's table of positions, made once and read in every layer, is too much for the reentrant kind in
        # transformers too
        for reentrant in (False,) if case == "deberta-v3" else (True, False):
            swapped.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
            if reentrant:
                swapped.enable_input_require_grads()
            recomputed = step(swapped, 1)
            assert all(torch.equal(x, y) for x, y in zip(first[1], recomputed[1]))


@pytest.mark.parametrize("case", ["bert", "albert", "deberta-v3", "mpnet", "modernbert", "gte"])
def test_kernels_run_and_agree(case, monkeypatch):
    """In Triton's interpreter on a CPU."""
    model, swapped, _ = pair_of(case, num_hidden_layers=2)
    inputs = inputs_of(model, "right")
    inputs = {name: x[:2] for name, x in inputs.items()}
    labels = torch.where(torch.rand(2, S) < 0.3, inputs["input_ids"], -100) * inputs["attention_mask"]
    labels[inputs["attention_mask"] == 0] = -100
    swapped.train(), model.train()
    expected = loss_of(model, inputs, labels=labels)
    monkeypatch.setattr(ops, "IMPL", "triton")
    assert_close(loss_of(swapped, inputs, labels=labels), expected)
    assert_gradients_equal(swapped, model)


@pytest.mark.parametrize(
    "case", ["bert", "roberta", "albert", "electra", "distilbert", "deberta-v3", "mpnet", "modernbert"]
)
def test_shapes_without_values(case):
    """On the meta device, and as fake tensors, which memory estimates are made with, there are no lengths to read."""
    model, swapped, _ = pair_of(case)
    inputs = inputs_of(model, "right")
    inputs["labels"] = labels_of(inputs)
    if not SWAPPED[case][0].startswith("Deberta"):
        # transformers' other models read it there
        del inputs["attention_mask"]
    for mode, device in ((FakeTensorMode(allow_non_fake_inputs=True), "cpu"), (nullcontext(), "meta")):
        with mode:
            moved = {name: x.to(device).clone() for name, x in inputs.items()}
            outs = [m.to(device)(**moved) for m in (model, swapped)]
        got, expected = ({name: x.shape for name, x in out.items() if torch.is_tensor(x)} for out in outs)
        assert got == expected and "loss" in got


@pytest.mark.parametrize("case", SWAPPED)
def test_unswap_gives_back_the_model_to_the_bit(case):
    model, swapped, report = pair_of(case)
    assert report.swapped and not [row for row in report.stayed if "padding" in row.reason]
    parameters = dict(swapped.named_parameters())
    classes = [type(module) for module in model.modules()]
    before, kept = model.state_dict(), dict(swapped.named_modules())
    assert list(swapped.state_dict()) == list(before)
    assert [type(m).__name__ for m in swapped.modules()] == [cls.__name__ for cls in classes]
    assert all(isinstance(m, cls) for m, cls in zip(swapped.modules(), classes))
    fastbert.unswap(swapped)
    assert [type(module) for module in swapped.modules()] == classes
    assert all(module is kept[name] for name, module in swapped.named_modules())
    assert all(parameter is parameters[name] for name, parameter in swapped.named_parameters())
    assert [sorted(vars(m)) for m in swapped.modules()] == [sorted(vars(m)) for m in model.modules()]
    inputs = inputs_of(model, "right")
    assert torch.equal(swapped(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("case", ["bert", "albert", "distilbert", "deberta-v3", "mpnet", "modernbert"])
@pytest.mark.parametrize("part", ["attention", "layer_norm", "gelu", "loss", "unpad"])
def test_switches(case, part):
    model, swapped, report = pair_of(case, switches={part: False})
    only = {name: False for name in ("attention", "layer_norm", "gelu", "loss") if name != part}
    _, alone, others = pair_of(case, switches=only if part != "unpad" else {"unpad": True})
    alone.load_state_dict(model.state_dict())
    inputs = inputs_of(model, "right")
    real = inputs["attention_mask"].bool()
    for one in (swapped, alone):
        assert_close(one(**inputs).logits, model(**inputs).logits, real)
    if part != "unpad":
        reasons = {row.reason for row in report.stayed}
        assert all(reason.startswith("switched off") and part in reason for reason in reasons)
        assert reasons or (case, part) == ("albert", "gelu")  # its only GELU is in a module with a norm
        assert others.swapped


def test_padding_is_gone_inside_and_only_there(monkeypatch):
    model, swapped, _ = pair_of("bert")
    seen = []
    monkeypatch.setattr(
        steps.ops,
        "linear_gelu",
        lambda x, *a, f=ops.linear_gelu, **k: seen.append(tuple(x.shape)) or f(x, *a, **k),
    )
    inputs = inputs_of(model, "right")
    swapped.base_model(**inputs)
    T = int(inputs["attention_mask"].sum())
    assert {shape[:-1] for shape in seen} == {(T,)}
    seen.clear()
    fastbert.swap(swapped, unpad=False)
    swapped.base_model(**inputs)
    assert {shape[:-1] for shape in seen} == {(B * S,)}


def test_training_keeps_no_scores():
    """The largest tensor that a step saves for its backward is far smaller than [B, S, V]."""
    model, swapped, _ = pair_of("bert", vocab_size=5000)
    inputs = inputs_of(model, "full")
    inputs["labels"] = torch.where(torch.rand(B, S) < 0.1, inputs["input_ids"], -100)
    swapped.train(), model.train()

    def largest(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(**inputs)
        weights = {p.numel() for p in model.parameters()}
        return max(size for size in sizes if size not in weights)

    assert largest(model) >= B * S * 5000
    assert largest(swapped) < B * S * 5000 / 4


def test_scores_in_training_when_asked_for():
    model, swapped, _ = pair_of("bert", switches={"logits": "always"})
    inputs = inputs_of(model, "right")
    labels = labels_of(inputs)
    swapped.train(), model.train()
    got, expected = swapped(**inputs, labels=labels), model(**inputs, labels=labels)
    assert_close(got.logits, expected.logits, inputs["attention_mask"].bool())
    assert_close(got.loss, expected.loss)


def test_the_loss_is_divided_by_the_labels_of_the_whole_step():
    model, swapped, _ = pair_of("bert")
    inputs = inputs_of(model, "full")
    labels = labels_of(inputs)
    swapped.train()
    whole = loss_of(swapped, inputs, labels=labels)
    gradients = [p.grad.clone() for p in swapped.parameters() if p.grad is not None]
    swapped.zero_grad()
    count = (labels != -100).sum()
    parts = [
        loss_of(swapped, {k: v[i] for k, v in inputs.items()}, labels=labels[i], num_items_in_batch=count)
        for i in (slice(0, 2), slice(2, 3), slice(3, B))
    ]
    assert_close(sum(parts), whole)
    own = [p.grad for p in swapped.parameters() if p.grad is not None]
    assert all((x - y).abs().max() < 1e-6 * max(1, y.abs().max()) for x, y in zip(own, gradients))


def test_report():
    model, _, report = pair_of("bert", "ForSequenceClassification")
    assert not report.stayed
    report.raise_if_incomplete()
    text = str(report)
    assert "bert.encoder.layer.0-2.attention.self" in text and "fused attention" in text
    assert f"{len(report.swapped)} modules swapped, 0 left as they were" in text
    assert len({row.name for row in report.rows}) == len(report.rows)
    relu = pair_of("bert", hidden_act="relu")[2]
    assert {row.module for row in relu.stayed} == {"BertIntermediate", "BertPredictionHeadTransform"}
    assert all("ReLU" in row.reason for row in relu.stayed)
    with pytest.raises(RuntimeError, match=r"bert\.encoder\.layer\.0-2\.intermediate \(BertIntermediate\).*ReLU"):
        relu.raise_if_incomplete()
    with pytest.raises(RuntimeError, match="nothing to swap"):
        fastbert.swap(nn.Linear(2, 2)).raise_if_incomplete()


@pytest.mark.parametrize(
    "switches, line",
    [
        (dict(unpad="never"), "unpad is 'never': expected 'auto', True or False"),
        (dict(logits="training"), "logits is 'training': expected 'evaluation' or 'always'"),
        (dict(attention="yes"), "attention is 'yes': expected True or False"),
    ],
)
def test_bad_switches(switches, line):
    model = nn.Sequential(nn.LayerNorm(3))
    with pytest.raises(ValueError, match=line):
        fastbert.swap(model, **switches)
    assert type(model[0]) is nn.LayerNorm
    with pytest.raises(TypeError, match="model is a dict: expected a torch.nn.Module"):
        fastbert.swap({})
