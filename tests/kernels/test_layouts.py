"""Any strides: every op, each of its tensors and each incoming gradient, in every layout that a caller may pass.

A view lies between guards, NaN or 1, in memory of its own. The op must give what it gives on contiguous copies, to the
bit wherever no product by the device's matrix library is involved. It must leave the memory as it was: views, gaps
between their elements, and guards.
"""

import functools
from itertools import accumulate

import pytest
import test_hazards as hazards
import torch
from calls import CALLS

GUARD = 16


def contiguous(shape):
    return shape and [*accumulate(reversed(shape[1:]), int.__mul__, initial=1)][::-1]


def column_slice(shape):
    return [2 * stride for stride in contiguous(shape)]


def slice_of_a_wider_tensor(shape):
    return contiguous([*shape[:-1], shape[-1] + 5])


def transpose(shape):
    return contiguous(shape[::-1])[::-1]


def first_two_swapped(shape):
    strides = contiguous([shape[1], shape[0], *shape[2:]])
    return [strides[1], strides[0], *strides[2:]]


def expanded_rows(shape):
    return [0, *contiguous(shape[1:])]


def one_number(shape):
    return [0] * len(shape)


def odd_offset(shape):
    return contiguous(shape)


# calls that hand their tensors to the kernels as another call does: tested with all tensors laid out alike, at once
ALIKE = {
    "attention-window", "biased_attention",
    "bias_gelu-tanh", "embedding-three_types", "pooling-max", "masked_cross_entropy-smoothed",
    "contrastive_cross_entropy-symmetric",
}  # fmt: skip
LAYOUTS = [
    column_slice, slice_of_a_wider_tensor, transpose, first_two_swapped, expanded_rows, one_number, odd_offset
]  # fmt: skip
# for incoming gradients, and for calls that take the interpreter long
FEW = [column_slice, transpose, one_number, odd_offset]
SLOW = {"biased_attention", "disentangled_attention"}
# layouts that repeat numbers, which changes the values
REPEATING = {expanded_rows, one_number}


def differ(name, shape):
    """The layouts that differ for a tensor of this shape; only some where the interpreter is slow."""
    layouts = FEW if name in SLOW else LAYOUTS
    if len(shape) == 0:
        return [odd_offset]
    if len(shape) == 1:
        return [column_slice, one_number, odd_offset]
    if len(shape) == 2:
        return [layout for layout in layouts if layout is not first_two_swapped]
    return layouts


def laid_out(value, layout):
    """(view, memory): the view holds `value`'s numbers, or where the layout repeats numbers the first of them."""
    sizes, strides = list(value.shape), layout(list(value.shape))
    offset = GUARD + (layout is odd_offset)
    needed = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides)) + 1 + GUARD
    # reading an integer outside the view must not crash the test: 1 is a valid id
    alien = float("nan") if value.is_floating_point() else 1
    memory = torch.full((needed,), alien, dtype=value.dtype, device=value.device)
    own = [1 if stride == 0 else size for size, stride in zip(sizes, strides)]
    memory.as_strided(own, strides, offset).copy_(value[tuple(slice(n) for n in own)])
    return memory.as_strided(sizes, strides, offset), memory


def bits(memory):
    return memory.view(torch.uint8).clone()


@functools.cache
def plain(name, device):
    """(arguments, cotangents, outputs, gradients) of a call on contiguous tensors."""
    call = CALLS[name]
    arguments = call.arguments(device)
    generator = torch.Generator().manual_seed(1)
    outputs = call(arguments)
    cotangents = [torch.randn(x.shape, generator=generator).to(device) for x in outputs if x.is_floating_point()]
    return arguments, cotangents, *call.run(arguments, cotangents)


def check(name, arguments, cotangents, memories, expected, repeats=False):
    """repeats: numbers are repeated, so that which word is predicted may depend on the last digit."""
    before = [bits(memory) for memory in memories]
    outputs, gradients = CALLS[name].run(arguments, cotangents)
    for memory, then in zip(memories, before):
        assert torch.equal(bits(memory), then), "written to"
    pairs = [(f"output {i}", *pair) for i, pair in enumerate(zip(outputs, expected[0], strict=True))]
    pairs += [(f"gradient of {argument}", gradients[argument], expected[1][argument]) for argument in gradients]
    for what, got, wanted in pairs:
        if CALLS[name].exact or not (repeats or wanted.is_floating_point()):
            assert torch.equal(got, wanted), what
        elif wanted.is_floating_point():
            torch.testing.assert_close(got, wanted, rtol=0, atol=4e-6 * max(1.0, wanted.abs().max().item()), msg=what)


def tensors(arguments):
    return {n: x for n, x in arguments.items() if torch.is_tensor(x)}


def rounds(name, repeats):
    """{argument: layout} of several calls, in which every tensor has each of its layouts that repeat numbers, or each
    that does not."""
    choices = []
    for argument, value in tensors(CALLS[name].arguments("cpu")).items():
        # sequences cannot all begin at one place
        if not (argument.startswith("cu_seqlens") and repeats):
            choices.append((argument, [x for x in differ(name, value.shape) if (x in REPEATING) == repeats]))
    for k in range(max(len(own) for _, own in choices)):
        yield {argument: own[(k + i) % len(own)] for i, (argument, own) in enumerate(choices) if own}


@pytest.mark.parametrize(
    "name, layouts",
    [
        pytest.param(name, layouts, id=f"{name}-{'repeats' if repeats else 'values'}-{k}")
        for name in CALLS
        if name not in ALIKE
        for repeats in (False, True)
        for k, layouts in enumerate(rounds(name, repeats))
    ],
)
def test_inputs(name, layouts, device):
    arguments, cotangents, *expected = plain(name, device)
    views, memories = zip(*(laid_out(arguments[argument], layout) for argument, layout in layouts.items()))
    views = dict(zip(layouts, views))
    repeats = not all(torch.equal(view, arguments[argument]) for argument, view in views.items())
    if repeats:
        expected = CALLS[name].run(arguments | {n: view.contiguous() for n, view in views.items()}, cotangents)
    check(name, arguments | views, cotangents, memories, expected, repeats)


def cases_of_gradients():
    for name in (name for name in CALLS if name not in ALIKE):
        outputs = CALLS[name](CALLS[name].arguments("cpu"), impl="reference")
        layouts = (layout for x in outputs if x.is_floating_point() for layout in differ(name, x.shape))
        for layout in dict.fromkeys(layout for layout in layouts if layout in FEW):
            yield pytest.param(name, layout, id=f"{name}-{layout.__name__}")


@pytest.mark.parametrize("name, layout", list(cases_of_gradients()))
def test_incoming_gradients(name, layout, device):
    arguments, cotangents, *expected = plain(name, device)
    views, memories = zip(*(laid_out(x, layout if layout in differ(name, x.shape) else odd_offset) for x in cotangents))
    if not all(torch.equal(*pair) for pair in zip(views, cotangents)):
        expected = CALLS[name].run(arguments, [view.contiguous() for view in views])
    check(name, arguments, views, memories, expected)


@pytest.mark.parametrize("layout", [column_slice, transpose], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("name", sorted(ALIKE))
def test_all_at_once(name, layout, device):
    arguments, cotangents, *expected = plain(name, device)
    pairs = {
        n: laid_out(x, layout if layout in differ(name, x.shape) else column_slice)
        for n, x in tensors(arguments).items()
    }
    views = [laid_out(x, layout if layout in differ(name, x.shape) else odd_offset) for x in cotangents]
    memories = [memory for _, memory in (*pairs.values(), *views)]
    check(name, arguments | {n: view for n, (view, _) in pairs.items()}, [v for v, _ in views], memories, expected)


@pytest.mark.parametrize("name", CALLS)
def test_the_contiguous_call_is_right(name, device):
    """The other tests compare with it."""
    hazards.check(CALLS[name], CALLS[name].arguments(device))
