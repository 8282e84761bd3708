"""The gradient of logits of which few rows count: known by these rows alone, dense to whoever wants to see it whole.

So that `nn.CrossEntropyLoss` behind a linear layer, two modules that know nothing of each other, costs a backward over
the labelled rows only. N rows, M of them picked, C classes.
"""

import torch


class TakeRowsFunction(torch.autograd.Function):
    """x[places] for x [N, C], whose gradient is a RowGradient."""

    @staticmethod
    def forward(ctx, x, places):
        ctx.save_for_backward(places)
        ctx.N = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, dout):
        (places,) = ctx.saved_tensors
        rows = _Rows(dout, places, ctx.N)
        # with create_graph=True somebody differentiates what is done here
        return rows.dense() if torch.is_grad_enabled() else RowGradient(rows, (ctx.N, dout.shape[1])), None


class _Rows:
    """What the views of one RowGradient share: values [M, C] at `places` [M] of N rows, the others 0."""

    def __init__(self, values, places, N):
        self.values, self.places, self.N = values, places, N
        self.whole = None

    def dense(self):
        """[N, C], from the first call on what counts: somebody may write to it."""
        if self.whole is None:
            self.whole = self.values.new_zeros(self.N, self.values.shape[1]).index_copy(0, self.places, self.values)
        return self.whole


class RowGradient(torch.Tensor):
    """The gradient of logits [..., C] that knows which rows are 0, so that a linear layer's backward multiplies the
    others alone, and [N, C] is never held. To all but matrix products it is the tensor that it stands for.

    rows: a _Rows. shape [..., C], of N rows in all. order: the dimensions in another order than that, as for `permute`.
    """

    @staticmethod
    def __new__(cls, rows, shape, order=None):
        like = torch.empty(shape, device="meta")
        like = like if order is None else like.permute(order)
        values = rows.values
        return torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=values.dtype, device=values.device
        )

    def __init__(self, rows, shape, order=None):
        own = list(range(len(shape)))
        self.rows, self.straight = rows, shape
        self.order = own if order is None else order
        self.is_straight = self.order == own

    def dense(self):
        return self.rows.dense().view(self.straight).permute(self.order)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        step = _STEPS.get(function)
        if step is not None and all(x.rows.whole is None for x in args if isinstance(x, RowGradient)):
            result = step(*args, **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = torch.utils._pytree.tree_map_only(RowGradient, RowGradient.dense, (args, kwargs))
        return function(*args, **kwargs)

    def __repr__(self):
        return repr(self.dense())

    def __reduce_ex__(self, protocol):
        return self.dense().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return self.dense().clone()

    def numpy(self, *, force=False):
        return self.dense().numpy(force=force)

    def tolist(self):
        return self.dense().tolist()


def _viewed(x, shape=None):
    shape = x.shape if shape is None else torch.empty(x.shape, device="meta").view(shape).shape
    if shape == x.shape:
        return RowGradient(x.rows, x.straight, x.order)
    return RowGradient(x.rows, shape) if x.is_straight and shape[-1:] == x.shape[-1:] else NotImplemented


def _permuted(x, order):
    return RowGradient(x.rows, x.straight, [x.order[d] for d in order])


def _transposed(x, a=0, b=1):
    order = list(range(x.dim()))
    order[a], order[b] = order[b], order[a]
    return _permuted(x, order) if len(order) > 1 else NotImplemented


def _product(x, y):
    if not isinstance(x, RowGradient) or isinstance(y, RowGradient):
        return NotImplemented
    values, places = x.rows.values, x.rows.places
    if not x.is_straight:
        return values.t() @ y[places]
    return y.new_zeros(len(x), y.shape[1]).index_copy_(0, places, values @ y)


def _summed(x, dim=None, keepdim=False, *, dtype=None):
    if not x.is_straight or x.dim() != 2 or list(dim or ()) != [0]:
        return NotImplemented
    return x.rows.values.sum(0, keepdim, dtype=dtype)


def _copied(x, *, dtype=None, **others):
    if any(value not in (None, False, torch.strided, x.device) for value in others.values()):
        return NotImplemented
    return RowGradient(_Rows(x.rows.values.to(dtype or x.dtype), x.rows.places, x.rows.N), x.straight, x.order)


_STEPS = {
    torch.ops.aten.view.default: _viewed,
    torch.ops.aten._unsafe_view.default: _viewed,
    torch.ops.aten.detach.default: _viewed,
    torch.ops.aten.alias.default: _viewed,
    torch.ops.aten.t.default: _transposed,
    torch.ops.aten.transpose.int: _transposed,
    torch.ops.aten.permute.default: _permuted,
    torch.ops.aten.mm.default: _product,
    torch.ops.aten.sum.dim_IntList: _summed,
    torch.ops.aten._to_copy.default: _copied,
}
