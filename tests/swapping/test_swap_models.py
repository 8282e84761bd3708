"""What people do with a model besides calling it: hooks, copies, pickles, adapters of their own, wrappers, compilers.

Each test does it to a swapped model and to the same model as it was.
"""

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import fastbert

ROOT = Path(__file__).resolve().parents[2]
B, S, V, D = 3, 11, 50, 32


def config(**options):
    sizes = dict(
        vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
        max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertConfig(**{**sizes, **options})


def tiny(cls=transformers.BertForMaskedLM, **options):
    torch.manual_seed(0)
    model = cls(config(**options)).eval()
    for parameter in model.parameters():
        # norms keep their weights near 1, so that texts stay apart
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, V, (B, S), generator=generator)
    mask = (torch.arange(S) < torch.tensor([[S], [4], [7]])).long()
    picked = (torch.rand(B, S, generator=generator) < 0.4) & mask.bool()
    return dict(input_ids=ids * mask, attention_mask=mask, labels=torch.where(picked, ids, -100))


def is_swapped(module):
    return hasattr(type(module), "replaces")


def logits(out):
    """At real positions."""
    return out.logits.detach()[batch()["attention_mask"].bool()].float()


def assert_close(got, expected, tolerance=1e-5):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance


def gradients(model, inputs=None):
    model.zero_grad()
    loss = model(**(inputs or batch())).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected, tolerance=1e-5):
    # an embedding without a gradient and one with zeros are the same to an optimizer without momentum only
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() <= tolerance, name


def run(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_the_same_model():
    import inspect

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
    assert_close(logits(reloaded(**batch())), logits(model(**batch())))


def test_copies_and_pickles(tmp_path):
    model = tiny()
    expected = logits(model(**batch()))
    fastbert.swap(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert is_swapped(other) and is_swapped(other.bert.encoder)
        assert_close(logits(other(**batch())), expected)
        with torch.no_grad():
            other.bert.embeddings.word_embeddings.weight.zero_()
        fastbert.unswap(other)
        assert not any(map(is_swapped, other.modules()))
    # none of this has reached the first
    assert is_swapped(model)
    assert_close(logits(model(**batch())), expected)

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
    assert run(code, tmp_path / "model.pt").strip() == "same"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype):
    plain, model = tiny().to(dtype), tiny()
    fastbert.swap(model)
    model.to(dtype)
    expected, got = plain(**batch()), model(**batch())
    assert got.logits.dtype == dtype
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-12}[dtype]
    assert_close(logits(got), logits(expected), tolerance)
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
        expected, got = plain(**batch()), model(**batch())
    assert got.logits.dtype == expected.logits.dtype == torch.bfloat16 and got.loss.dtype == expected.loss.dtype
    assert_close(logits(got), logits(expected), 0.1)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch()).loss
    loss.backward()
    assert abs(loss - expected.loss) < 0.05


def test_inference_mode():
    plain, model = tiny(), tiny()
    fastbert.swap(model)
    with torch.inference_mode():
        got = model(**batch()).logits
    assert got.is_inference()
    assert_close(got[batch()["attention_mask"].bool()], logits(plain(**batch())))
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
    assert_close(logits(model(**batch())), logits(plain(**batch())))
    assert_same_gradients(gradients(model.train()), gradients(plain.train()))
    for one in (plain, model):
        torch.manual_seed(2)
        one.set_input_embeddings(nn.Embedding(V + 7, D))
        one.tie_weights()
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
    assert_same_gradients(gradients(model), gradients(plain))


def test_an_optimizer_built_before_trains_it():
    losses = []
    for swaps in (False, True):
        model = tiny().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if swaps:
            fastbert.swap(model)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(**batch()).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and losses[0][-1] < losses[0][0] - 0.5


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
        one.bert.encoder.layer[1].output.LayerNorm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert_close(logits(model(**batch())), logits(plain(**batch())))


def test_global_hooks():
    model, seen = tiny(), []
    fastbert.swap(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        model(**batch())
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == sum(isinstance(module, nn.Linear) for module in model.modules())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    plain, model = (tiny(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train() for _ in range(2))
    fastbert.swap(model)
    fastbert.swap(plain)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=use_reentrant))
    torch.manual_seed(5)
    got = gradients(model)
    torch.manual_seed(5)
    # dropout is drawn again as it was
    assert_same_gradients(got, gradients(plain), 1e-6)
    without = [tiny().train() for _ in range(2)]
    fastbert.swap(without[0])
    without[0].gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=use_reentrant))
    assert_same_gradients(gradients(without[0]), gradients(without[1]))


def test_torch_compile():
    """With its own code generator; graphs of a training step: test_swap_clients.py, test_swap_peers.py."""
    torch._dynamo.reset()
    plain, model = (tiny(transformers.BertModel, num_hidden_layers=1) for _ in range(2))
    fastbert.swap(model)
    ids, mask = batch()["input_ids"], batch()["attention_mask"]
    with torch.no_grad():
        got, expected = torch.compile(model)(ids, mask)[0], plain(ids, mask)[0]
    assert_close(got[mask.bool()], expected[mask.bool()])


def test_exported_and_traced_graphs_are_those_of_the_model_itself():
    inputs = batch()["input_ids"], batch()["attention_mask"]
    other = torch.ones_like(inputs[1])
    plain, model = (tiny(transformers.BertModel, return_dict=False) for _ in range(2))
    fastbert.swap(model)
    exported = torch.export.export(model, inputs).module()
    traced = torch.jit.trace(model, inputs)
    for graph in (exported, traced):
        for mask in (inputs[1], other):  # nothing in it depends on the lengths that it was made with
            real = mask.bool()
            assert_close(graph(inputs[0], mask)[0][real], plain(inputs[0], mask)[0][real])
    assert is_swapped(model.encoder)


def test_data_parallel_replicas():
    """nn.DataParallel copies modules by their __dict__: what `replicate` does, without its GPUs."""
    plain, model = tiny(), tiny()
    fastbert.swap(model)
    replica = model._replicate_for_data_parallel()
    assert is_swapped(replica) and replica is not model
    assert_close(logits(replica(**batch())), logits(plain(**batch())))


def test_two_threads_run_two_models():
    models = [tiny(), tiny(num_hidden_layers=1)]
    expected = [logits(model(**batch())) for model in models]
    for model in models:
        fastbert.swap(model)
    results = [[], []]

    def work(i):
        with torch.no_grad():
            for _ in range(5):
                results[i].append(logits(models[i](**batch())))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(results, expected):
        assert len(got) == 5
        for x in got:
            assert_close(x, wanted)
