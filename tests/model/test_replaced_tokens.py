"""Replaced-token detection: each number against transformers' two models, sharing, and sampling."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_families import SIZES, V3

from fastbert.model import families, hf_files, presets
from fastbert.model.replaced_tokens import ReplacedTokenPretraining
from fastbert.packing import Batch, pack_inputs
from fastbert.training.step_sums import accumulate

CONFIGS = {
    "electra": {**SIZES, "model_type": "electra", "embedding_size": 13},
    "electra-square": {**SIZES, "model_type": "electra", "embedding_size": 36},
    "deberta-v3": {**SIZES, **V3, "model_type": "deberta-v2"},
    "deberta-v2-positions": {
        **SIZES,
        **V3,
        "model_type": "deberta-v2",
        "position_biased_input": True,
        "type_vocab_size": 2,
    },
}
B, S = 5, 13
WEIGHT = 50.0


def config_of(case):
    return hf_files.config_from_hf(CONFIGS[case])


def model_of(case, **options):
    """A model whose weights are larger than its initial ones, so that differences show."""
    model = ReplacedTokenPretraining(config_of(case), **options)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.2)
    return model.eval()


def masked_text():
    """(text, mask, labels, input_ids), each [B, S]: short rows are padded, one is padding alone."""
    mask = (torch.arange(S) < torch.tensor([13, 4, 0, 9, 1])[:, None]).long()
    text = torch.randint(10, 99, (B, S)) * mask
    labels = text.where((torch.rand(B, S) < 0.4) & mask.bool(), -100)
    hidden = (labels != -100) & (torch.rand(B, S) < 0.85)
    return text, mask, labels, text.masked_fill(hidden, 4)


def theirs_of(case, ours):
    """[(transformers' model, {our name: its name})] of generator and discriminator, with the weights of `ours`."""
    name = {"electra": "Electra", "deberta-v2": "DebertaV2"}[ours.config.model_type]
    make = getattr(transformers, f"{name}ForMaskedLM"), getattr(transformers, f"{name}Model")
    if name == "Electra":
        make = make[0], transformers.ElectraForPreTraining
    detector = ours.detector()
    result = []
    for own, cls in zip((ours.generator, detector), make):
        config = transformers.AutoConfig.for_model(**hf_files.config_to_hf(own.config))
        theirs = cls(config).eval()
        names = hf_files.hf_names(own.state_dict(), own.config, type(own).__name__)
        prefix = f"{theirs.base_model_prefix}." if cls.__name__.endswith("Model") else ""
        tensors = {names[x].removeprefix(prefix): y for x, y in own.state_dict().items()}
        missing, _ = theirs.load_state_dict(tensors, strict=False)
        assert not [x for x in missing if "decoder" not in x and "lm_head.weight" not in x and "position_ids" not in x]
        result.append((theirs, {x: theirs_name.removeprefix(prefix) for x, theirs_name in names.items()}))
    return result


@pytest.mark.parametrize("sharing", ["shared", "gdes", "none"])
@pytest.mark.parametrize("case", CONFIGS)
def test_both_losses_and_every_gradient_equal_transformers(case, sharing, monkeypatch):
    """A padded batch there, a packed one here; the same tokens are put in place of the masked ones."""
    ours = model_of(case, embedding_sharing=sharing, rtd_weight=WEIGHT)
    (generator, generator_names), (discriminator, names) = theirs_of(case, ours)
    text, mask, labels, input_ids = masked_text()
    picked = labels != -100
    # some of the tokens are the true ones
    sampled = torch.where(torch.rand(int(picked.sum())) < 0.4, text[picked], torch.randint(10, 99, text[picked].shape))
    corrupted = text.masked_scatter(picked, sampled)
    replaced = (corrupted != text).long()
    assert 0 < replaced.sum() <= picked.sum()

    monkeypatch.setattr(ours, "sample", lambda hidden, draws: sampled)
    batch, _ = pack_inputs(ours.config, input_ids, mask, labels=labels)
    sums = accumulate(ours, [batch])

    # transformers' tables, tied or summed by hand
    embeddings = generator.base_model.embeddings, discriminator.base_model.embeddings
    shared = {
        name
        for name, x in embeddings[0].named_parameters()
        if x.shape == dict(embeddings[1].named_parameters())[name].shape and ("Norm" not in name or sharing == "shared")
    }
    prefix = "" if type(discriminator).__name__.endswith("Model") else "electra."
    residuals, tables = {}, {}
    for name in shared if sharing != "none" else ():
        table = dict(embeddings[0].named_parameters())[name]
        key = f"{prefix}embeddings.{name}"
        if sharing == "shared":
            tables[key] = table
        else:
            residuals[key] = (dict(embeddings[1].named_parameters())[name] - table).detach().requires_grad_()
            tables[key] = table.detach() + residuals[key]
    mlm = generator(input_ids=input_ids, attention_mask=mask, labels=labels).loss
    inputs = dict(input_ids=corrupted, attention_mask=mask)
    if ours.config.model_type == "electra":
        inputs["labels"] = replaced
        rtd = torch.func.functional_call(discriminator, tables, (), inputs).loss
    else:
        # transformers has no such head: ours, written out
        head = {n: x.detach().clone().requires_grad_() for n, x in ours.discriminator.named_parameters()
                if n.startswith(("dense", "classifier"))}  # fmt: skip
        hidden = torch.func.functional_call(discriminator, tables, (), inputs).last_hidden_state[mask.bool()]
        hidden = F.gelu(F.linear(hidden, head["dense.weight"], head["dense.bias"]))
        logits = F.linear(hidden, head["classifier.weight"], head["classifier.bias"])[:, 0]
        rtd = F.binary_cross_entropy_with_logits(logits, replaced[mask.bool()].float())
    (mlm + WEIGHT * rtd).backward()

    assert (sums["count"], sums["rtd_count"]) == (picked.sum(), mask.sum())
    assert sums["rtd_replaced"] == replaced.sum()
    assert sums["loss"] / sums["count"] == pytest.approx(mlm.item(), rel=1e-5)
    assert sums["rtd_loss"] / sums["rtd_count"] == pytest.approx(rtd.item(), rel=1e-5)
    theirs = {f"generator.{x}": dict(generator.named_parameters())[y].grad for x, y in generator_names.items()}
    found = dict(discriminator.named_parameters())
    for x, y in names.items():
        if y in residuals:
            theirs[f"discriminator.{x}"] = residuals[y].grad
        elif y not in tables:
            theirs[f"discriminator.{x}"] = found[y].grad if y in found else head[x].grad
    own = dict(ours.named_parameters())
    assert own.keys() == theirs.keys()
    for name, gradient in theirs.items():
        gradient = torch.zeros_like(own[name]) if gradient is None else gradient
        mine = torch.zeros_like(own[name]) if own[name].grad is None else own[name].grad
        assert (mine - gradient).abs().max() < 1e-5 * max(1, gradient.abs().max().item()), name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("electra-small", (12, 64, 1, 256, 128)),
        ("electra-base", (12, 256, 4, 1024, 768)),
        ("electra-large", (24, 256, 4, 1024, 1024)),
        ("deberta-v3-small", (3, 768, 12, 3072, 768)),
        ("deberta-v3-base", (6, 768, 12, 3072, 768)),
        ("deberta-v3-large", (12, 1024, 16, 4096, 1024)),
    ],
)
def test_generators_have_the_published_sizes(name, expected):
    config = presets.preset(name)
    row = families.family(config.model_type)
    made = row.generator(config)
    found = (made.num_hidden_layers, made.hidden_size, made.num_attention_heads, made.intermediate_size)
    assert (*found, made.embedding_width) == expected
    assert row.embedding_sharing == ("shared" if name.startswith("electra") else "gdes")


def test_what_is_shared():
    model = model_of("electra")
    ours, theirs = model.discriminator.encoder.embeddings, model.generator.encoder.embeddings
    for part in ("word", "position", "token_type", "norm"):
        assert getattr(ours, part).weight is getattr(theirs, part).weight
    assert ours.norm.bias is theirs.norm.bias and ours.project.weight is not theirs.project.weight
    optimized = sum(x.numel() for x in model.parameters())
    apart = sum(x.numel() for part in (model.generator, model.discriminator) for x in part.parameters())
    assert apart - optimized == (99 + 40 + 2 + 2) * 13

    model = ReplacedTokenPretraining(config_of("deberta-v3"))
    assert model.embedding_sharing == "gdes"
    table = model.generator.encoder.embeddings.word.weight
    assert not model.discriminator.encoder.embeddings.word.weight.any()
    assert torch.equal(model.detector().encoder.embeddings.word.weight, table)


def test_samples_have_the_generators_distribution():
    """Evenly spaced draws give each token as often as its probability says, give or take one at each end."""
    model = model_of("electra")
    hidden = torch.randn(3, 13)
    with torch.no_grad():
        model.generator.vocabulary_bias[[0, 50, 98]] = float("-inf")
        scores = F.linear(hidden, model.generator.encoder.embeddings.word.weight, model.generator.vocabulary_bias)
    draws = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    for row, expected in zip(hidden, scores.double().softmax(-1)):
        tokens = model.sample(row.expand(5000, -1), draws)
        assert torch.equal(tokens, tokens.sort().values)
        counts = torch.bincount(tokens, minlength=99)
        assert (counts - 5000 * expected).abs().max() <= 1.01 and counts[[0, 50, 98]].sum() == 0
    ends = model.sample(hidden[:1].expand(2, -1), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert ends.tolist() == [1, 97]
    assert model.sample(hidden[:0], draws[:0]).shape == (0,)


def test_the_discriminator_reads_the_text_with_the_samples_in_it():
    """Fixed capacity: picks of the last row without a label, an empty sequence, tokens past the last sequence."""
    model = model_of("electra")
    text = torch.tensor([2, 11, 12, 13, 3, 2, 14, 3, 0, 0])
    labels = torch.full((10,), -100)
    labels[[1, 3, 6]] = text[[1, 3, 6]]
    input_ids = text.clone()
    # one pick is left as it is, and one is masked and guessed
    input_ids[[3, 6]] = 4
    batch = Batch(
        input_ids, torch.zeros(10, dtype=torch.int64), torch.zeros(10, dtype=torch.int64),
        torch.tensor([0, 5, 8, 8], dtype=torch.int32), 5, labels=labels, picks=torch.tensor([1, 3, 6, 9, 9]),
        seed=torch.tensor([5]),
    )  # fmt: skip
    corrupted = model.corrupt(batch, torch.tensor([70, 13, 71, 72, 73]))
    assert corrupted.input_ids.tolist() == [2, 70, 12, 13, 3, 2, 71, 3, 0, 0]
    assert corrupted.labels.tolist() == [0, 1, 0, 0, 0, 0, 1, 0, -100, -100]
    assert corrupted.seed != batch.seed and torch.equal(batch.input_ids, input_ids)


def test_without_labels_and_with_tables_of_other_widths():
    with pytest.raises(ValueError, match="labels is None"):
        model_of("electra")(torch.ones(1, 3, dtype=torch.int64))
    config = config_of("electra")
    other = families.family("electra").generator(config).replace(embedding_size=12)
    with pytest.raises(ValueError, match=r"generator is \(99, 12\) and that of the discriminator \(99, 13\)"):
        ReplacedTokenPretraining(config, other)
    ReplacedTokenPretraining(config, other, embedding_sharing="none")
    with pytest.raises(ValueError, match="embedding_sharing is 'all': expected one of shared, gdes, none"):
        ReplacedTokenPretraining(config, embedding_sharing="all")
    with pytest.raises(ValueError, match="a bert has no detector of replaced tokens: electra, deberta-v2 have"):
        ReplacedTokenPretraining(presets.preset("bert-tiny"))
