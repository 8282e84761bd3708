"""What people do with attn_implementation="fastbert": training, compilers, saving, imports."""

import warnings

import pytest
import torch
import transformers
from small import output, start
from test_huggingface_attention import MASKS, B, S, assert_close, assert_same_gradients, batch, build, gradients, pair
from torch._subclasses.fake_tensor import FakeTensorMode

from fastbert import ops
from fastbert.packing import Layout
from fastbert.swapping import attn_implementation


def train(model, **arguments):
    model.train()
    torch.manual_seed(5)
    inputs, real = batch("left")
    torch.manual_seed(6)
    hidden = model(**inputs).last_hidden_state
    return hidden.detach(), gradients(model, hidden, real)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize(
    ("family", "impl"), [("Bert", "cpu"), ("ModernBert", "cpu"), ("Bert", "triton")], indirect=["impl"]
)
def test_gradient_checkpointing_replays_dropout(family, reentrant, impl):
    dropout = {"attention_dropout": 0.3} if family == "ModernBert" else {"attention_probs_dropout_prob": 0.3}
    model = build(family, attn_implementation="fastbert", **dropout)
    wanted, wanted_gradients = train(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reentrant: no input asks for a gradient; the embeddings then get none
        model.enable_input_require_grads()
        got, got_gradients = train(model)
    assert torch.equal(got, wanted)
    for name, gradient in wanted_gradients.items():
        assert torch.equal(got_gradients[name], gradient), name


def test_dropout_is_drawn_anew_in_each_layer_and_step(impl, calls):
    options = dict(attention_probs_dropout_prob=0.25, hidden_dropout_prob=0.0)
    model = build("Bert", attn_implementation="fastbert", **options).train()
    inputs, real = batch("right")
    first, second = model(**inputs).last_hidden_state, model(**inputs).last_hidden_state
    assert not torch.equal(first[real], second[real])
    assert len({int(c[-1]["seed"]) for c in calls}) == 4 and {c[-1]["dropout_p"] for c in calls} == {0.25}
    model.eval()
    assert torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    assert not any("dropout_p" in c[-1] for c in calls[4:])


@pytest.mark.parametrize(
    ("impl", "family", "mask"),
    [("cpu", "Bert", "holes"), ("triton", "Bert", "a row of padding"), ("triton", "ModernBert", "left")],
    indirect=["impl"],
)
def test_compiled(family, mask, impl, calls, fresh_compiler):
    eager, fast = pair(family, num_hidden_layers=2)
    inputs, real = batch(mask)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    wanted, got = eager(**inputs).last_hidden_state, compiled(**inputs).last_hidden_state
    assert_close(got[real], wanted[real])
    assert torch.isfinite(got).all()
    assert_same_gradients(gradients(fast, got, real), gradients(eager, wanted, real))
    if impl == "triton":
        assert calls
    else:
        assert not calls  # nothing in PyTorch's own attention over ragged sequences can be traced


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("impl", ["triton"], indirect=True)
def test_compiled_with_gradient_checkpointing(reentrant, impl, fresh_compiler):
    eager, fast = pair("Bert", num_hidden_layers=1, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    inputs, real = batch("right")
    wanted = eager(**inputs).last_hidden_state
    fast.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    fast.enable_input_require_grads()
    got = torch.compile(fast, backend="aot_eager")(**inputs).last_hidden_state
    assert_close(got[real], wanted[real])
    assert_same_gradients(gradients(fast, got, real), gradients(eager, wanted, real))


@pytest.mark.parametrize("impl", ["triton"], indirect=True)
def test_layers_compiled_one_by_one(impl, fresh_compiler):
    eager, fast = pair("Bert", num_hidden_layers=1)
    for layer in fast.encoder.layer:
        layer.compile(backend="aot_eager")
    for mask in ("right", "none"):
        inputs, real = batch(mask)
        assert_close(fast(**inputs).last_hidden_state[real], eager(**inputs).last_hidden_state[real])


def test_inference_mode_and_training_afterwards(impl):
    eager, fast = pair("ModernBert")
    inputs, real = batch("right")
    with torch.inference_mode():
        inferred = fast(**inputs).last_hidden_state
    wanted, got = eager(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    assert_close(inferred.clone()[real], wanted[real])
    assert_same_gradients(gradients(fast, got, real), gradients(eager, wanted, real))


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "half"])
@pytest.mark.parametrize(
    ("impl", "family"),
    [("cpu", "Bert"), ("cpu", "ModernBert"), ("triton", "ModernBert")],
    indirect=["impl"],
)
def test_low_precision(family, how, impl):
    eager, fast = pair(family)
    inputs, real = batch("left")
    truth = eager(**inputs).last_hidden_state[real]
    if how != "autocast":
        eager, fast = (model.to(getattr(torch, how)) for model in (eager, fast))
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        plain, got = (model(**inputs).last_hidden_state[real] for model in (eager, fast))
    assert got.dtype == plain.dtype
    assert torch.isfinite(got).all()
    error, budget = ((x.float() - truth).abs().mean().item() for x in (got, plain))
    assert error <= 2 * budget


def test_loads_by_name_and_saves_no_trace_of_it(tmp_path):
    eager = build("Bert")
    eager.save_pretrained(tmp_path)
    fast = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="fastbert").eval()
    assert fast.config._attn_implementation == "fastbert"
    inputs, real = batch()
    assert_close(fast(**inputs).last_hidden_state[real], eager(**inputs).last_hidden_state[real])
    fast.save_pretrained(tmp_path / "again")
    assert "fastbert" not in (tmp_path / "again" / "config.json").read_text()
    fast.set_attn_implementation("sdpa")
    assert_close(fast(**inputs).last_hidden_state[real], eager(**inputs).last_hidden_state[real])


def test_import_is_all_it_takes():
    code = """
import sys, fastbert
assert not {"torch", "transformers"} & set(sys.modules)
import transformers
config = transformers.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
model = transformers.AutoModel.from_config(config, attn_implementation="fastbert")
print(model.config._attn_implementation)
"""
    assert output(start(code)) == "fastbert"


INTERFACES = """
class AttentionInterface:
    known = {}
    register = known.__setitem__
AttentionMaskInterface = AttentionInterface
"""
IMPORTS = {
    "fastbert first": ("import fastbert, transformers.modeling_utils", True),
    "fastbert last": ("import transformers.modeling_utils, fastbert", True),
    "looked for": (
        "import fastbert, importlib.util; assert importlib.util.find_spec('transformers.modeling_utils')",
        True,
    ),
    "old": ("import fastbert, transformers.modeling_utils", False),
}


@pytest.mark.parametrize("order", IMPORTS)
def test_import_leaves_nothing_behind(order, tmp_path):
    # a transformers that is imported in no time, with its interfaces or from before it had them
    imports, has_interfaces = IMPORTS[order]
    package = tmp_path / "transformers"
    package.mkdir()
    for name in ("__init__", "modeling_utils", "masking_utils"):
        (package / f"{name}.py").write_text(INTERFACES if has_interfaces else "")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
{imports}
from transformers import modeling_utils
assert not [finder for finder in sys.meta_path if getattr(finder, "__module__", "").startswith("fastbert")]
assert "exec_module" not in vars(modeling_utils.__loader__)
assert modeling_utils.__file__ == {str(package / "modeling_utils.py")!r}
print(*getattr(modeling_utils, "AttentionInterface", IndexError).__dict__.get("known", ["nothing"]))
"""
    assert output(start(code)) == ("fastbert" if has_interfaces else "nothing")


@pytest.mark.parametrize("mask", ["none", "holes"])
def test_nothing_asks_the_device(mask, monkeypatch):
    # tensors without data cannot be asked how many tokens are real; on a GPU, asking would wait for it
    monkeypatch.setattr(ops, "IMPL", "triton")
    monkeypatch.setattr(ops, "attention", lambda q, k, v, *args, **kwargs: q + k + v)
    model = build("Bert", attn_implementation="fastbert").to("meta").train()
    inputs, _ = batch(mask)
    inputs = {name: x if x is None else x.to("meta") for name, x in inputs.items()}
    assert model(**inputs).last_hidden_state.shape == (B, S, 28)
    lengths = torch.zeros(5, dtype=torch.int32, device="meta")
    model(**inputs, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=7, max_length_k=7)


@pytest.mark.parametrize("family", ["Bert", "ModernBert"])
@pytest.mark.parametrize("mask", ["none", "left"])
def test_shapes_without_values(family, mask):
    model = build(family, attn_implementation="fastbert")
    inputs = {name: x for name, x in batch(mask)[0].items() if x is not None}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(x) for name, x in inputs.items()}
        assert model(**fake).last_hidden_state.shape == (B, S, 28)
    if mask == "none":
        # transformers reads a mask
        assert model.to("meta")(inputs["input_ids"].to("meta")).last_hidden_state.shape == (B, S, 28)


def test_a_mask_is_walked_like_any_tuple():
    # accelerate and FSDP move a layer's arguments so
    mask = attn_implementation._mask(torch.tensor(MASKS["right"], dtype=torch.bool), 3, B, S, torch.device("cpu"))
    moved = torch.utils._pytree.tree_map(lambda x: x.to("meta") if torch.is_tensor(x) else x, mask)
    assert isinstance(moved, attn_implementation.Mask)
    assert isinstance(moved.layout, Layout) and moved.window == 3
    assert moved.layout.cu_seqlens.is_meta and moved.layout.indices.is_meta
