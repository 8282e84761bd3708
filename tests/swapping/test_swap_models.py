"""What people do with a model besides calling it: hooks, copies, pickles, adapters of their own, wrappers, compilers.

Each test does it to a swapped model and to the same model as it was.
"""

import copy
import inspect
import io
import pickle
import threading

import pytest
import torch
import transformers
from small import D, V, assert_close, assert_same_gradients, batch, gradients, is_swapped, logits, output, start, tiny
from torch import nn

import fastbert


def test_it_is_the_same_model():
    plain, model = tiny(), tiny()
    names = list(dict(model.named_parameters()))
    parameters = list(model.parameters())
    state = {name: x.data_ptr() for name, x in model.state_dict().items()}
    fastbert.swap(model)
    assert isinstance(model, transformers.BertForMaskedLM) and type(model).__name__ == "BertForMaskedLM"
    assert isinstance(model.bert.encoder.layer[0].attention.self, type(plain.bert.encoder.layer[0].attention.self))
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert inspect.signature(type(model).forward) == inspect.signature(type(plain).forward)
    assert list(dict(model.named_parameters())) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert {name: x.data_ptr() for name, x in model.state_dict().items()} == state
    assert repr(model) == repr(plain)
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
    model.load_state_dict(plain.state_dict())


def test_save_pretrained_writes_nothing_of_ours(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "plain")
    fastbert.swap(model)
    model.save_pretrained(tmp_path / "swapped")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "swapped").iterdir())
    for name in files:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "swapped" / name).read_bytes(), name
    reloaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "swapped").eval()
    assert not any(map(is_swapped, reloaded.modules()))
    assert_close(logits(reloaded), logits(model))


def test_copies_and_pickles(tmp_path):
    model = tiny()
    expected = logits(model)
    fastbert.swap(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert is_swapped(other) and is_swapped(other.bert.encoder)
        assert_close(logits(other), expected)
        with torch.no_grad():
            other.bert.embeddings.word_embeddings.weight.zero_()
        fastbert.unswap(other)
        assert not any(map(is_swapped, other.modules()))
    # none of this has reached the first
    assert is_swapped(model)
    assert_close(logits(model), expected)

    torch.save(dict(model=model, batch=batch(), expected=expected), tmp_path / "model.pt")
    code = """
import sys, torch
saved = torch.load(sys.argv[1], weights_only=False)
model = saved["model"]
assert hasattr(type(model), "replaces")
real = saved["batch"]["attention_mask"].bool()
assert (model(**saved["batch"]).logits[real] - saved["expected"]).abs().max() < 1e-5
import fastbert
fastbert.unswap(model)
assert (model(**saved["batch"]).logits[real] - saved["expected"]).abs().max() < 1e-5
print("same")
"""
    assert output(start(code, tmp_path / "model.pt")) == "same"


@pytest.mark.parametrize(
    "kind, dtype",
    [("Bert", torch.float16), ("Bert", torch.bfloat16), ("Bert", torch.float64), ("Gte", torch.float64)],
    ids=str,
)
def test_dtypes(kind, dtype):
    plain, model = tiny(f"{kind}ForMaskedLM").to(dtype), tiny(f"{kind}ForMaskedLM")
    fastbert.swap(model)
    model.to(dtype)
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-12}[dtype]
    assert_close(logits(model), logits(plain), tolerance=tolerance)
    for mode in (model.eval, model.train):
        mode()
        loss = model(**batch()).loss
        # no less precise than theirs, which is of the model's dtype
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        assert abs(loss - plain(**batch()).loss) <= tolerance
    model.half().float()
    model.eval().bfloat16()
    assert model(**batch()).logits.dtype == torch.bfloat16


def test_autocast():
    plain, model = tiny(), tiny()
    fastbert.swap(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected, loss = logits(model), logits(plain), plain(**batch()).loss
        assert model(**batch()).loss.dtype == loss.dtype
        own = model.train()(**batch()).loss
    assert got.dtype == torch.bfloat16
    assert_close(got, expected, tolerance=0.1)
    own.backward()
    assert abs(own - loss) < 0.05


def test_inference_mode():
    plain, model = tiny(), tiny()
    fastbert.swap(model)
    with torch.inference_mode():
        got = model(**batch()).logits
    assert got.is_inference()
    assert_close(got[batch()["attention_mask"].bool()], logits(plain))
    # and what it has remembered of it does no harm to training
    assert_same_gradients(gradients(model.train()), gradients(plain.train()))


def test_embeddings_are_resized_replaced_and_tied():
    plain, model = tiny(), tiny()
    fastbert.swap(model)
    for one in (plain, model):
        torch.manual_seed(1)
        one.resize_token_embeddings(V + 7)
        nn.init.normal_(one.get_input_embeddings().weight, std=0.2)
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == V + 7
    assert_close(logits(model), logits(plain))
    assert_same_gradients(gradients(model.train()), gradients(plain.train()))
    for one in (plain, model):
        torch.manual_seed(2)
        one.set_input_embeddings(nn.Embedding(V + 7, D))
        one.tie_weights()
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
    assert_same_gradients(gradients(model), gradients(plain))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "name", ["encoder", "encoder.layer.1", "encoder.layer.0.attention", "encoder.layer.0.attention.self",
             "encoder.layer.0.attention.self.query", "encoder.layer.1.attention.output.dense",
             "encoder.layer.1.attention.output.LayerNorm", "encoder.layer.0.intermediate",
             "encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dropout"],
)  # fmt: skip
def test_hooks_see_what_they_saw(name, when):
    """Each kind of hook by itself: as many calls, the same shapes, the same values at real positions."""
    real = batch()["attention_mask"].bool()

    def seen(kind, swaps):
        model, calls = tiny().train(), []
        if swaps and when == "after":
            fastbert.swap(model)
        module = model.bert.get_submodule(name)

        def keep(values):
            while not torch.is_tensor(values):
                values = values["last_hidden_state"] if isinstance(values, dict) else values[0]
            calls.append(values.detach().clone())

        if kind == "in":
            module.register_forward_pre_hook(lambda module, args: keep(args))
        elif kind == "out":
            module.register_forward_hook(lambda module, args, out: keep(out))
        else:
            module.register_full_backward_hook(lambda module, dx, dout: keep(dout))
        if swaps and when == "before":
            fastbert.swap(model)
        model(**batch()).loss.backward()
        return calls

    for kind in ("in", "out", "back"):
        if (name, kind) == ("encoder", "back"):  # a backward hook wants tensors or tuples
            continue
        got, expected = seen(kind, True), seen(kind, False)
        assert [x.shape for x in got] == [x.shape for x in expected] and got
        for a, b in zip(got, expected):
            assert_close(a[real], b[real])


def test_a_hook_that_changes_something_changes_it():
    plain, model = tiny(), tiny()
    fastbert.swap(model)
    for one in (plain, model):
        one.bert.encoder.layer[0].attention.self.query.register_forward_hook(lambda module, args, out: out * 1.5)
        one.bert.encoder.layer[1].output.LayerNorm.register_forward_pre_hook(lambda module, args: (args[0].square(),))
    assert_close(logits(model), logits(plain))


def test_data_parallel_replicas():
    """nn.DataParallel copies modules by their __dict__: what `replicate` does, without its GPUs."""
    plain, model = tiny(), tiny()
    fastbert.swap(model)
    replica = model._replicate_for_data_parallel()
    assert is_swapped(replica) and replica is not model
    assert_close(logits(replica), logits(plain))


def test_two_threads_run_two_models():
    models = [tiny(), tiny(num_hidden_layers=1)]
    expected = [logits(model) for model in models]
    for model in models:
        fastbert.swap(model)
    results = [[], []]

    def work(i):
        with torch.no_grad():
            for _ in range(5):
                results[i].append(logits(models[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(results, expected):
        assert len(got) == 5
        for x in got:
            assert_close(x, wanted)
