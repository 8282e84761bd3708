"""What goes wrong in libraries like this one, shown not to go wrong here, for every op of the table in calls.py.

tests/README.md has the list of hazards.
"""

import functools

import pytest
import torch
from calls import CALLS, is_floating
from helpers import IMPLEMENTATIONS, assert_same_bits, assert_within_budget, cu_seqlens_of

# numpy warns about elements that are not stored, and about the infinities under test
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

every_call = pytest.mark.parametrize("name", CALLS)
# one call for each set of kernels: what its autograd.Function does is the same in the others
every_op = pytest.mark.parametrize("name", [name for name in CALLS if name.partition("-")[2] in ("", "tiled")])
over_sequences = pytest.mark.parametrize("name", [n for n, call in CALLS.items() if call.takes("cu_seqlens")])


def check(call, arguments, impl="triton"):
    """Values and gradients against the reference in float64."""
    assert_within_budget(lambda **a: call(a, impl), lambda **a: call(a, "reference"), **arguments)


def same(got, wanted):
    """Two results of Call.run are equal to the bit."""
    assert_same_bits(got[0], wanted[0])
    assert_same_bits(got[1].values(), wanted[1].values())


@functools.cache
def once(name, device, with_cotangents=True):
    """(arguments, cotangents, outputs, {argument: gradient}) of a call, for all tests that compare with it."""
    call = CALLS[name]
    arguments, cotangents = call.arguments(device), None
    if with_cotangents:
        cotangents = random_cotangents(call, arguments)
    return arguments, cotangents, *call.run(arguments, cotangents)


def random_cotangents(call, arguments):
    # the reference gives the shapes in a fraction of the interpreter's time
    shapes = [x.shape for x in call(arguments, impl="reference") if x.is_floating_point()]
    return [torch.randn(shape, device=arguments[call.tokens[0]].device) for shape in shapes]


GUARD = 512


class Guarded:
    """Inside it, new memory is filled with NaN, or 77, and lies between guards that no store may touch."""

    def __init__(self, monkeypatch):
        self.patch, self.memories = monkeypatch, []

    def __enter__(self):
        for name, fill in (("empty", None), ("empty_like", None), ("zeros", 0), ("zeros_like", 0)):
            self.patch.setattr(torch, name, self.made(getattr(torch, name), fill))

    def made(self, make, fill):
        def guarded(*args, **kwargs):
            plain = make(*args, **kwargs)
            size = 1 + sum((n - 1) * stride for n, stride in zip(plain.shape, plain.stride())) if plain.numel() else 0
            alien = float("nan") if plain.is_floating_point() else 77
            memory = torch.full((size + 2 * GUARD,), alien, dtype=plain.dtype, device=plain.device)
            self.memories.append((memory, memory.clone()))
            view = memory.as_strided(plain.shape, plain.stride(), GUARD)
            return view if fill is None else view.fill_(fill)

        return guarded

    def __exit__(self, *_):
        self.patch.undo()
        assert self.memories
        for memory, before in self.memories:
            for end in (slice(GUARD), slice(-GUARD, None)):
                torch.testing.assert_close(memory[end], before[end], rtol=0, atol=0, equal_nan=True)


@every_call
def test_every_element_is_written_and_nothing_outside(name, device, monkeypatch):
    """The results do not depend on what memory held, and no store lands outside a tensor."""
    call = CALLS[name]
    # guarded first: without guards, a store outside its tensor may end the process
    torch.use_deterministic_algorithms(True)
    try:
        # torch's own switch covers memory that is allocated in other ways
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3, device=device).isnan().all()
        with Guarded(monkeypatch):
            got = call.run(call.arguments(device))
    finally:
        torch.use_deterministic_algorithms(False)
    same(got, once(name, device, False)[2:])


@every_op
def test_any_incoming_gradient_is_honoured(name, device):
    """Gradients are linear in it: for a negative multiple, for zero, and for an output that is used twice."""
    arguments, cotangents, _, expected = once(name, device)
    leaves = {n: x.detach().requires_grad_() for n, x in arguments.items() if is_floating(x)}
    outputs = [x for x in CALLS[name](arguments | leaves) if x.is_floating_point()]
    # powers of 2 change no digit
    for factor in (-0.25, 0.0):
        scaled = torch.autograd.grad(
            outputs, list(leaves.values()), [factor * c for c in cotangents], retain_graph=True
        )
        for argument, gradient in zip(leaves, scaled):
            assert torch.equal(gradient, factor * expected[argument]), (factor, argument)
    sum((2 * x * c).sum() - (x * c).sum() for x, c in zip(outputs, cotangents)).backward()
    for argument, gradient in expected.items():
        assert torch.equal(leaves[argument].grad, gradient), argument


@every_op
def test_backward_twice_and_saved_tensors_of_other_ops(name, device):
    """The op before it finds its own saved output unchanged, also in a second backward."""
    call = CALLS[name]
    arguments = call.arguments(device)
    leaves = {n: x.detach().requires_grad_() for n, x in arguments.items() if is_floating(x)}
    # exp saves its output, which is the op's input; softmax as well
    inputs = {n: (0.5 * x).exp() if i % 2 else x.softmax(-1) for i, (n, x) in enumerate(leaves.items())}
    kept = {n: x.detach().clone() for n, x in inputs.items()}
    outputs = [x for x in call(arguments | inputs) if x.is_floating_point()]
    cotangents = [torch.randn(x.shape, device=device) for x in outputs]
    results = [torch.autograd.grad(outputs, list(leaves.values()), cotangents, retain_graph=True) for _ in range(2)]
    assert_same_bits(*results)
    _, own = call.run(arguments | kept, cotangents)
    assert_same_bits((inputs[n] for n in kept), kept.values())
    wanted = torch.autograd.grad(list(inputs.values()), list(leaves.values()), [own[n] for n in inputs])
    assert_same_bits(results[0], wanted)


@every_op
def test_two_calls_on_one_input(name, device):
    """Two heads on the same tensors: the second finds them unchanged."""
    call = CALLS[name]
    arguments, cotangents, _, expected = once(name, device)
    leaves = {n: x.detach().requires_grad_() for n, x in arguments.items() if is_floating(x)}
    outputs = [x for _ in range(2) for x in call(arguments | leaves) if x.is_floating_point()]
    torch.autograd.backward(outputs, 2 * cotangents)
    for argument, gradient in expected.items():
        # the order of a sum of more than two terms changes its rounding
        within = dict(rtol=0, atol=0 if call.exact else 1e-6 * max(1.0, gradient.abs().max().item()))
        torch.testing.assert_close(leaves[argument].grad, 2 * gradient, **within, msg=argument)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@every_call
def test_no_tokens(name, impl, device):
    """No sequence, or only empty ones, also with rows past the last: zeros of the right shapes, and zero gradients."""
    call = CALLS[name]
    whole = call.arguments(device)
    starts = {n for n, x in whole.items() if n.startswith("cu_seqlens") and x is not None}
    for sequences, rows in ((0, 0), (2, 0), (0, 3), (2, 3)) if starts else ((0, 0),):
        arguments = whole | {token: whole[token][:rows] for token in call.tokens}
        arguments |= {n: cu_seqlens_of([0] * sequences, device) for n in starts}
        wanted = call(arguments, impl="reference")
        outputs, gradients = call.run(arguments, impl=impl)
        for got, want in zip(outputs, wanted, strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype and torch.equal(got, torch.zeros_like(got))
        for argument, gradient in gradients.items():
            assert gradient.shape == arguments[argument].shape, argument
            assert torch.equal(gradient, torch.zeros_like(gradient)), argument


def sequences(name, lengths, device, dtype=torch.float32, slack=2, size=1.0):
    """The arguments of a call for other lengths, and `slack` rows past the last sequence."""
    arguments = CALLS[name].arguments(device, dtype)
    lengths_q = [-(-n // 2) for n in lengths]
    for token in CALLS[name].tokens:
        asks = token == "q" and arguments.get("cu_seqlens_q") is not None
        rows = sum(lengths_q if asks else lengths) + slack
        arguments[token] = torch.randn(rows, *arguments[token].shape[1:], device=device, dtype=dtype) * size
    arguments["cu_seqlens"] = cu_seqlens_of(lengths, device)
    if "max_seqlen" in arguments:
        arguments["max_seqlen"] = max(arguments["max_seqlen"], *lengths)
    if CALLS[name].op == "biased_attention":
        arguments["bias"] = torch.randn(
            2 * arguments["max_seqlen"], arguments["bias"].shape[1], device=device, dtype=dtype
        )
    if arguments.get("cu_seqlens_q") is not None:
        arguments["cu_seqlens_q"], arguments["max_seqlen_q"] = cu_seqlens_of(lengths_q, device), max(lengths_q)
    return arguments


@over_sequences
def test_awkward_lengths_and_large_inputs(name, device):
    # the interpreter is slow on attention with relative positions
    is_slow = CALLS[name].op in ("biased_attention", "disentangled_attention")
    batches = [[1, 2, 33]] if is_slow else [[1, 2, 5, 17, 31, 33]]
    if name in ("attention", "pooling"):
        batches += [[127], [129]]
    for lengths in batches:
        check(CALLS[name], sequences(name, lengths, device, torch.float16, size=5.0))


HEAD_SIZES = [8, 24, 32, 59, 64, 80, 111, 128]


@pytest.mark.parametrize("K", HEAD_SIZES)
@pytest.mark.parametrize("name", ["attention", "attention-tiled"])
def test_head_sizes(name, K, device):
    arguments = CALLS[name].arguments(device, torch.float16)
    check(CALLS[name], arguments | dict(q=torch.randn(*arguments["q"].shape[:-1], K, device=device).half()))


@over_sequences
def test_slack_may_hold_anything(name, device):
    """Rows past the last sequence are not read; output and gradient are 0 there, whatever they or dout hold."""
    call = CALLS[name]
    clean = sequences(name, [3, 0, 6], device)
    cotangents = random_cotangents(call, clean)
    expected = call.run(clean, cotangents)
    dirty = dict(clean)
    for token in call.tokens:
        dirty[token] = clean[token].clone()
        dirty[token][-2], dirty[token][-1] = float("nan"), -float("inf")
    for x in cotangents:
        if len(x) != len(clean["cu_seqlens"]) - 1:
            x[-2], x[-1] = float("inf"), float("nan")
    got = call.run(dirty, cotangents)
    same(got, expected)
    for token in call.tokens:
        assert torch.equal(got[1][token][-2:], torch.zeros_like(got[1][token][-2:]))


@over_sequences
def test_sequences_do_not_see_each_other(name, device):
    """A sequence gives the same bits alone and among others, and NaN in one sequence stays there."""
    call = CALLS[name]
    silent = {"dropout_p": 0.0} if call.takes("dropout_p") else {}
    arguments = sequences(name, [4, 3, 6], device, slack=0) | silent
    if arguments.get("cu_seqlens_q") is not None:
        arguments |= dict(
            q=arguments["k"].select(1, 0).contiguous(), cu_seqlens_q=arguments["cu_seqlens"], max_seqlen_q=6
        )
    per_token = len(call(arguments, impl="reference")[0]) == 13
    dirty = dict(arguments)
    alone = dict(arguments)
    for token in call.tokens:
        dirty[token] = arguments[token].clone()
        dirty[token][4:7] = float("nan")
        alone[token] = arguments[token][7:]
    for n in ("cu_seqlens", "cu_seqlens_q"):
        if alone.get(n) is not None:
            alone[n] = cu_seqlens_of([6], device)
    whole, whole_gradients = call.run(arguments)
    got, gradients = call.run(dirty)
    others = [0, 1, 2, 3, 7, 8, 9, 10, 11, 12]
    rows = others if per_token else [0, 2]
    assert_same_bits((got[0][rows],), (whole[0][rows],))
    for token in call.tokens:
        assert_same_bits((gradients[token][others],), (whole_gradients[token][others],))
    only, only_gradients = call.run(alone)
    assert_same_bits((only[0],), (whole[0][7:] if per_token else whole[0][2:],))
    for token in call.tokens:
        assert_same_bits((only_gradients[token],), (whole_gradients[token][7:],))


ROW_WISE = [
    n
    for n, call in CALLS.items()
    if call.op in ("layer_norm", "bias_gelu", "gelu_layer_norm", "embedding", "rms_norm", "gated_activation")
]


@pytest.mark.parametrize("name", ROW_WISE)
def test_rows_do_not_see_each_other(name, device):
    """A row gives the same bits wherever it is and whatever is beside it."""
    call = CALLS[name]
    silent = {"dropout_p": 0.0} if call.takes("dropout_p") else {}
    arguments = call.arguments(device) | silent
    (whole,) = call(arguments)
    for row in (0, len(whole) - 1):
        (alone,) = call(arguments | {n: arguments[n][row : row + 1] for n in call.tokens})
        assert torch.equal(alone[0], whole[row])
