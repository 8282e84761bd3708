"""What only a GPU can show: real sizes, every dtype, races, streams, graphs, memory. `make gpu` runs these tests.

Without a GPU, what can runs at tiny sizes in Triton's interpreter, so that the file does not rot; the rest is skipped.
"""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from helpers import cu_seqlens_of

from fastbert import ops, reference
from fastbert.kernels import _bands, _launch
from fastbert.model.config import EncoderConfig
from fastbert.model.heads import MaskedLM
from fastbert.packing import Batch
from fastbert.proof import op_cases
from fastbert.proof.op_cases import OPS, WITH_DROPOUT, Case, cotangent, floating, ragged_lengths, results, run_of, truth

ON_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
# other tests show the numbers of each dtype in the interpreter
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]
TOKENS = 4096 if ON_GPU else 16
LENGTHS = (128, 512) if ON_GPU else (8,)
REPEATS = 50 if ON_GPU else 2

every_op = pytest.mark.parametrize("op", OPS)


def case_of(op, dtype=torch.float32, longest=LENGTHS[0], dropout_p=0.0, tokens=TOKENS):
    model = op_cases.TABLE[op].models[0] if ON_GPU else "tiny"
    return Case(op, model, tuple(ragged_lengths(tokens, longest)), dtype, dropout_p)


def kernels(op):
    return functools.partial(getattr(ops, op), impl="triton")


def tensors(result):
    output, gradients = result
    return [output, *gradients]


def assert_as_close_as_plain(got, case, arguments):
    """The error, against the reference in float64, is at most 2 times (gradients: 3) that of the reference in `dtype`.

    Errors are norms over a whole tensor. A sum of losses is one number, whose error in the reference is small by
    chance: it has a floor instead.
    """
    exact = tensors(truth(case, arguments, torch.float64))
    plain = tensors(results(run_of(getattr(reference, case.op), arguments)))
    floor = 1e-6 if case.dtype == torch.float32 else 1e-4
    for i, (g, p, t) in enumerate(zip(tensors(got), plain, exact, strict=True)):
        assert g.shape == t.shape and g.dtype == p.dtype
        assert torch.isfinite(g).all(), f"tensor {i} is not finite"
        size = t.norm().clamp(min=1e-30)
        error, budget = ((g - t).norm() / size).item(), ((p - t).norm() / size).item()
        slack = 2 if i == 0 else 3
        assert error <= slack * budget + (10 * floor if t.dim() == 0 else floor), (
            f"tensor {i}: error {error:.2e}, that of plain PyTorch {budget:.2e}"
        )


# --- every op at real sizes


def variants():
    """(op, dropout_p, longest sequence): with and without dropout, and all lengths, where an op depends on them."""
    for op in OPS:
        lengths = LENGTHS if op in ("attention", "disentangled_attention", "pooling") else LENGTHS[:1]
        dropout = [0.0] * (ON_GPU or op not in WITH_DROPOUT) + [0.1] * (op in WITH_DROPOUT)
        yield from ((op, dropout_p, longest) for dropout_p in dropout for longest in lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op, dropout_p, longest", list(variants()))
def test_values_and_gradients(op, dropout_p, longest, dtype, device, poison):
    case = case_of(op, dtype, longest, dropout_p)
    arguments = case.arguments(device)
    assert_as_close_as_plain(results(run_of(kernels(op), arguments)), case, arguments)


def settings_offered(op, arguments, monkeypatch):
    """The largest number of settings that a kernel of this op offers."""
    offered = [0]

    def look(run, kernel, key, candidates, overwrites):
        offered.append(len(candidates))
        return candidates[0]

    search_with(look, monkeypatch)
    results(run_of(kernels(op), arguments))
    return max(offered)


def search_with(choose, monkeypatch):
    monkeypatch.setattr(_launch, "AUTOTUNE", True)
    monkeypatch.setattr(_launch, "profile_of", functools.cache(lambda device: {}))
    monkeypatch.setattr(_launch, "fastest", choose)


@pytest.mark.parametrize("dtype", [DTYPES[-1], torch.float32] if ON_GPU else [torch.float32], ids=str)
@every_op
def test_every_setting_that_is_offered_is_right(op, dtype, device, poison, monkeypatch):
    """In a search a wrong setting would stay hidden until it is the fastest."""
    case = case_of(op, dtype, dropout_p=0.1 if op in WITH_DROPOUT else 0.0)
    arguments = case.arguments(device)
    count = settings_offered(op, arguments, monkeypatch)
    if not count:
        pytest.skip("no settings to choose from")
    # the interpreter is slow: only the last one there
    for i in range(1, count) if ON_GPU else [count - 1]:

        def take(run, kernel, key, candidates, overwrites):
            settings = candidates[i % len(candidates)]  # noqa: B023
            try:
                kept = [x.clone() for x in overwrites]
                run(settings)
                for x, old in zip(overwrites, kept):
                    x.copy_(old)
            except _launch.DO_NOT_FIT:
                return candidates[0]
            return settings

        search_with(take, monkeypatch)
        assert_as_close_as_plain(results(run_of(kernels(op), arguments)), case, arguments)


@pytest.mark.parametrize("shift", [1, 3, 5] if ON_GPU else [3])
@every_op
def test_misaligned_tensors(op, shift, device):
    """Every floating tensor, and the incoming gradient, starts at an odd element."""

    def shifted(x):
        room = torch.empty(x.numel() + shift, dtype=x.dtype, device=x.device)
        return room[shift:].view(x.shape).copy_(x)

    case = case_of(op, DTYPES[-1])
    arguments = case.arguments(device)
    run = run_of(kernels(op), arguments | {name: shifted(x) for name, x in floating(arguments).items()})
    gradient = cotangent(run)
    output = run.forward()
    gradients = torch.autograd.grad(output, run.leaves, gradient if output.dim() == 0 else shifted(gradient))
    assert_as_close_as_plain((output.detach(), gradients), case, arguments)


# --- races: FlashAttention's rule, many repeats of a large batch


@pytest.mark.parametrize("dtype", [DTYPES[-1]], ids=str)
@every_op
def test_repeats_give_the_same_bits(op, dtype, device):
    tokens = 65536 if ON_GPU else TOKENS
    for longest in LENGTHS:
        case = case_of(op, dtype, longest, 0.1 if op in WITH_DROPOUT else 0.0, tokens)
        run = run_of(kernels(op), case.arguments(device))
        first = tensors(results(run))
        for i in range(REPEATS - 1):
            for j, (a, b) in enumerate(zip(first, tensors(results(run)), strict=True)):
                assert torch.equal(a, b), f"repeat {i + 1}, tensor {j} differs"


# --- tensors of more than 2^31 elements


def last_rows(op, arguments, cu_seqlens=None, rows=200):
    """The call's output and gradient of its first argument, for the last rows, and the same of these rows alone.

    With cu_seqlens, the last sequence alone.
    """
    name = next(iter(arguments))
    start = int(cu_seqlens[-2]) if cu_seqlens is not None else len(arguments[name]) - rows
    alone = {
        key: x[start:] if torch.is_tensor(x) and x.shape[:1] == arguments[name].shape[:1] else x
        for key, x in arguments.items()
    }
    if cu_seqlens is not None:
        alone["cu_seqlens"] = cu_seqlens[-2:] - cu_seqlens[-2]
    found = []
    for function, part in ((kernels(op), arguments), (functools.partial(getattr(reference, op)), alone)):
        run = run_of(function, part)
        output = run.forward()
        # the last rows of both get the same gradient
        gradient = torch.linspace(-1, 1, output.shape[-1], device=output.device).to(output.dtype).expand_as(output)
        wanted = [leaf for key, leaf in zip(floating(part), run.leaves) if key == name]
        gradients = torch.autograd.grad(output, wanted, gradient)
        size = 1 if op == "pooling" else len(alone[name])
        found.append([x[-size:].float() for x in (output.detach(), *(g[-len(alone[name]) :] for g in gradients))])
        del run, output, gradients
    return found


@needs_gpu
@pytest.mark.parametrize("op", [op for op in OPS if "cross_entropy" not in op and op != "vocabulary_max"])
def test_offsets_beyond_two_to_the_31(op, device):
    """Row number times width overflows 32 bits: the last rows must be right, and must be the ones that are written."""
    case = case_of(op, torch.bfloat16)
    widths = {"attention": 2304, "disentangled_attention": 2304, "bias_gelu": 3072}
    tokens = (2**31 // widths.get(op, 768) // 128 + 2) * 128
    if op == "gelu_layer_norm":
        tokens = round(tokens / 0.15)
    if torch.cuda.get_device_properties(device).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GB of memory")
    arguments = replace(case, lengths=(128,) * (tokens // 128)).arguments(device)
    if op == "embedding":
        check_long_embedding(arguments)
        return
    got, wanted = last_rows(op, arguments, arguments.get("cu_seqlens"))
    for g, w in zip(got, wanted, strict=True):
        assert ((g - w).norm() / w.norm()).item() < 0.02


def check_long_embedding(arguments):
    tokens = len(arguments["input_ids"])
    arguments["input_ids"][:] = 1
    arguments["input_ids"][-5:] = 2  # the only rows of word 2
    run = run_of(kernels("embedding"), arguments)
    output = run.forward()
    alone = {name: x[-5:] if x.shape[0] == tokens else x for name, x in arguments.items()}
    few = run_of(reference.embedding, alone)
    small = few.forward()
    assert ((output[-5:].float() - small.float()).norm() / small.float().norm()).item() < 0.02
    gradient = torch.linspace(-1, 1, small.shape[-1], device=small.device).to(small.dtype)
    dword = torch.autograd.grad(output, run.leaves[0], gradient.expand_as(output))[0][2].float()
    wanted = torch.autograd.grad(small, few.leaves[0], gradient.expand_as(small))[0][2].float()
    assert ((dword - wanted).norm() / wanted.norm()).item() < 0.02


@needs_gpu
def test_logits_beyond_two_to_the_31(device):
    """The masked-LM loss of 72k picked tokens, and a single chunk with as many logits."""
    for M, V, D in ((72_000, 30_522, 64), (4_096, 600_000, 64)):
        hidden = torch.randn(M, D, device=device, dtype=torch.bfloat16, requires_grad=True)
        weight = (0.1 * torch.randn(V, D, device=device)).to(torch.bfloat16).requires_grad_()
        bias = torch.zeros(V, device=device, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.randint(V, (M,), device=device)
        loss, count, _ = kernels("masked_cross_entropy")(hidden, weight, bias, labels)
        (dhidden,) = torch.autograd.grad(loss, hidden)
        assert count.item() == M
        assert (loss.item() / M) == pytest.approx(torch.tensor(V).log().item(), rel=0.1)
        rows = hidden[-100:].detach().float().requires_grad_()
        logits = rows @ weight.detach().float().T
        wanted = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels[-100:], reduction="sum"), rows)[0]
        assert ((dhidden[-100:].float() - wanted).norm() / wanted.norm()).item() < 0.02


# --- precision


SWITCHES = {"allow_tf32": (False, True), "fp32_precision": ("ieee", "tf32")}


@needs_gpu
@pytest.mark.parametrize("switch", [name for name in SWITCHES if hasattr(torch.backends.cuda.matmul, name)])
@pytest.mark.parametrize("op", [op for op in OPS if "attention" in op or "cross_entropy" in op])
def test_fp32_is_fp32_unless_tf32_is_allowed(op, switch, device):
    """Triton multiplies fp32 in tf32 by default; ours follows torch's switch."""
    case = case_of(op)
    arguments = case.arguments(device)
    exact = tensors(truth(case, arguments, torch.float64))
    errors, before = {}, getattr(torch.backends.cuda.matmul, switch)
    try:
        for allowed, value in zip((False, True), SWITCHES[switch]):
            setattr(torch.backends.cuda.matmul, switch, value)
            got = tensors(results(run_of(kernels(op), arguments)))
            errors[allowed] = [((g - t).norm() / t.norm()).item() for g, t in zip(got, exact)]
    finally:
        setattr(torch.backends.cuda.matmul, switch, before)
    assert max(errors[False]) < 2e-5, errors
    # tf32 keeps 10 bits of 23; the switch must do something
    assert 5e-5 < max(errors[True]) < 2e-2, errors


# --- streams, devices, graphs


@needs_gpu
@every_op
def test_work_goes_to_the_current_stream(op, device):
    arguments = case_of(op).arguments(device)
    run = run_of(kernels(op), arguments)
    wanted = tensors(results(run))
    gradient = cotangent(run)
    stream, busy = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        # the stream allocates memory and library handles of its own, which may wait for the device
        torch.autograd.grad(run.forward(), run.leaves, gradient)
    torch.cuda.synchronize()
    # the default stream idles for a second: work queued behind it cannot finish earlier
    torch.cuda._sleep(2 * 10**9)
    busy.record()
    with torch.cuda.stream(stream):
        output = run.forward()
        got = [output.detach(), *torch.autograd.grad(output, run.leaves, gradient)]
        done = torch.cuda.Event()
        done.record()
    done.synchronize()
    assert not busy.query(), "waited for the default stream"
    torch.cuda.synchronize()
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g, w)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_op
def test_a_gpu_that_is_not_the_current_one(op):
    case = case_of(op, torch.bfloat16)
    arguments = case.arguments(torch.device("cuda", 0))
    elsewhere = {name: x.to("cuda:1") if torch.is_tensor(x) else x for name, x in arguments.items()}
    torch.cuda.set_device(0)
    wanted, got = (tensors(results(run_of(kernels(op), part))) for part in (arguments, elsewhere))
    for g, w in zip(got, wanted, strict=True):
        assert g.device == torch.device("cuda", 1)
        assert torch.equal(g.cpu(), w.cpu())


# the widths of BERT-base, whose kernels other tests here compile too: another width would take seconds to compile
CONFIG = EncoderConfig(vocab_size=997, num_hidden_layers=2, max_position_embeddings=64)
ROOM = dict(tokens=256, sequences=10, picks=48)


def fixed_batch(lengths, device, seed):
    """A packed batch of constant shapes: free tokens, empty sequences and picks without a label fill it up."""
    generator = torch.Generator().manual_seed(seed)
    T, used = ROOM["tokens"], sum(lengths)
    assert used < T and len(lengths) <= ROOM["sequences"]
    ids = torch.randint(5, CONFIG.vocab_size, (T,), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(T - used, dtype=torch.int64)])
    picks = torch.randperm(used, generator=generator)[: ROOM["picks"] // 2].sort().values
    labels = torch.full((T,), -100).index_copy(0, picks, ids[picks])
    picks = torch.cat([picks, torch.full((ROOM["picks"] - len(picks),), T - 1)])
    cu_seqlens = cu_seqlens_of(list(lengths) + [0] * (ROOM["sequences"] - len(lengths)), "cpu")
    batch = Batch(ids, positions, positions % 2, cu_seqlens, 64, labels, picks, seed=torch.tensor([seed]))
    return batch.to(device)


BATCHES = [(64, 1, 30), (5, 64, 64, 2, 9, 40), (13,) * 10, (64, 64, 64)]


def tensors_of(batch):
    return [x for x in vars(batch).values() if torch.is_tensor(x)]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_training_step_as_a_cuda_graph(dtype, device, monkeypatch):
    """Captured once, replayed on batches of other lengths: the losses are those of the same steps one by one."""
    monkeypatch.setattr(ops, "IMPL", "triton")
    torch.manual_seed(0)
    model = MaskedLM(CONFIG).to(device).train()
    twin = copy.deepcopy(model)
    static = fixed_batch(BATCHES[0], device, 0)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, capturable=True) for m in (model, twin)]

    def step(model, optimizer, batch):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32, cache_enabled=False):
            loss = model(batch).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, optimizers[0], static)
    torch.cuda.current_stream().wait_stream(stream)
    # existing gradients belong to memory outside the graph
    optimizers[0].zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(model, optimizers[0], static)
    # back to the start, in place
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            mine.copy_(theirs)
        for state in optimizers[0].state.values():
            for x in state.values():
                x.zero_()
    close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=5e-3, atol=1e-3)
    for i in range(8):
        batch = fixed_batch(BATCHES[i % len(BATCHES)], device, i)
        for x, new in zip(tensors_of(static), tensors_of(batch), strict=True):
            x.copy_(new)
        graph.replay()
        torch.testing.assert_close(loss, step(twin, optimizers[1], batch), **close)


@needs_gpu
def test_disentangled_attention_first_called_inside_a_cuda_graph(device, monkeypatch):
    """The tables of distances are then made in the graph, neither copied from the host nor cached for later calls."""
    arguments = case_of("disentangled_attention", torch.bfloat16, dropout_p=0.1).arguments(device)
    run = run_of(kernels("disentangled_attention"), arguments)
    wanted = tensors(results(run))
    gradient = cotangent(run)
    monkeypatch.setattr(_bands, "TABLES", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run.forward()
        got = [output, *torch.autograd.grad(output, run.leaves, gradient)]
    assert not _bands.TABLES
    for _ in range(2):
        # what was in the graph's memory before must not matter
        for x in got:
            x.detach().fill_(float("nan"))
        graph.replay()
        for g, w in zip(got, wanted, strict=True):
            assert torch.equal(g, w)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_never_waits_for_the_device(dtype, device, monkeypatch):
    monkeypatch.setattr(ops, "IMPL", "triton")
    model = MaskedLM(CONFIG).to(device).train()
    batch = fixed_batch(BATCHES[0], device, 0)

    def step():
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = model(batch).loss
        loss.backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_torch_compile_with_inductor(device, monkeypatch):
    monkeypatch.setattr(ops, "IMPL", "triton")
    torch.manual_seed(0)
    model = MaskedLM(CONFIG).to(device).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    for i, lengths in enumerate(BATCHES):
        batch = fixed_batch(lengths, device, i)
        wanted, got = model(batch).loss, compiled(batch).loss
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        got.backward()
        wanted.backward()
    # the gradient of the key bias is zero up to rounding, which differs between the two
    size = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    for (name, a), b in zip(model.named_parameters(), compiled.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 1e-3 * a.grad.norm() + 1e-5 * size, name


# --- memory


def peak_bytes(call):
    call()  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@needs_gpu
def test_masked_cross_entropy_holds_no_logits(device):
    """BERT-base's head on 10,000 picked tokens: 0.6 GB at most, where the logits and their gradient take 2.4."""
    M, V, D = 10_000, 30_522, 768
    hidden, weight, bias = (
        torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for shape in ((M, D), (V, D), (V,))
    )
    labels = torch.randint(V, (M,), device=device)

    def call():
        torch.autograd.grad(kernels("masked_cross_entropy")(hidden, weight, bias, labels)[0], (hidden, weight, bias))

    assert peak_bytes(call) <= 0.6e9


@needs_gpu
def test_attention_memory_does_not_grow_with_the_square_of_the_length(device):
    run = {}
    for longest in (128, 1024):
        case = Case("attention", "bert-base", (longest,) * (65536 // longest), torch.bfloat16, 0.1)
        run[longest] = run_of(kernels("attention"), case.arguments(device))
    peaks = {}
    for longest, r in run.items():
        gradient = cotangent(r)
        peaks[longest] = peak_bytes(lambda: torch.autograd.grad(r.forward(), r.leaves, gradient))  # noqa: B023
    # the tiled kernels save statistics of each row; scores of one layer would be 800 MB
    assert peaks[1024] <= 1.1 * peaks[128] + 2**24
