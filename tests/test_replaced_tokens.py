"""Replaced-token detection: each number against transformers' two models, sharing, sampling, and whole runs."""

import json
import math
import multiprocessing
import random
import signal

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from fastbert import checkpoint, pretrain, report, variants
from fastbert.data import MaskedBatches
from fastbert.fill_mask import fill_mask, load
from fastbert.heads import MaskedLM, ReplacedTokenDetector, ReplacedTokenPretraining, pack_inputs
from fastbert.packing import Batch
from fastbert.pretrain import PretrainConfig
from fastbert.shards import Shards, prepare
from fastbert.tokenizer import save_tokenizer, train_wordpiece

SIZES = dict(
    vocab_size=99, hidden_size=36, num_hidden_layers=3, num_attention_heads=3, intermediate_size=37,
    max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
V3 = dict(
    model_type="deberta-v2", relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0,
    position_buckets=4, share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False,
)  # fmt: skip
CONFIGS = {
    "electra": {**SIZES, "model_type": "electra", "embedding_size": 13},
    "electra-square": {**SIZES, "model_type": "electra", "embedding_size": 36},
    "deberta-v3": {**SIZES, **V3},
    "deberta-v2-positions": {**SIZES, **V3, "position_biased_input": True, "type_vocab_size": 2},
}
B, S = 5, 13
SEP = 7
MISSED, WEIGHT = -100, 50.0
WORDS = {
    "cat": "chases mice in dark barns", "dog": "guards sheep on green hills", "bird": "builds nests among tall trees",
    "fish": "follows currents under grey ice", "horse": "carries riders over stone bridges",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet_and_alone(monkeypatch):
    monkeypatch.setattr(report, "_tensorboard", lambda *_: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(case):
    return variants.config_from_hf(CONFIGS[case])


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


# ----------------------------------------------------------------------------------------- against transformers


def theirs_of(case, ours):
    """transformers' generator and encoder of the discriminator, with the weights of `ours`, and what it calls them."""
    name = {"electra": "Electra", "deberta-v2": "DebertaV2"}[ours.config.model_type]
    make = getattr(transformers, f"{name}ForMaskedLM"), getattr(transformers, f"{name}Model")
    if name == "Electra":
        make = make[0], transformers.ElectraForPreTraining
    detector = ours.detector()
    result = []
    for own, cls in zip((ours.generator, detector), make):
        config = transformers.AutoConfig.for_model(**variants.config_to_hf(own.config))
        theirs = cls(config).eval()
        names = variants.hf_names(own.state_dict(), own.config, type(own).__name__)
        prefix = f"{theirs.base_model_prefix}." if cls.__name__.endswith("Model") else ""
        tensors = {names[x].removeprefix(prefix): y for x, y in own.state_dict().items()}
        missing, _ = theirs.load_state_dict(tensors, strict=False)
        assert not [x for x in missing if "decoder" not in x and "lm_head.weight" not in x and "position_ids" not in x]
        result.append((theirs, {x: theirs_name.removeprefix(prefix) for x, theirs_name in names.items()}))
    return result


def electra_detects(theirs, input_ids, mask, labels):
    return theirs(input_ids=input_ids, attention_mask=mask, labels=labels).loss


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
    sums = pretrain.accumulate(ours, [batch])

    # theirs: tables tied or summed by hand
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


# ------------------------------------------------------------------------------------------------ its parts


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
    config = variants.preset(name)
    row = variants.family(config.model_type)
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
    """Draws that stand evenly in [0, 1) give each token as often as its probability says, but for one at each end."""
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
    other = variants.family("electra").generator(config).replace(embedding_size=12)
    with pytest.raises(ValueError, match=r"generator is \(99, 12\) and that of the discriminator \(99, 13\)"):
        ReplacedTokenPretraining(config, other)
    ReplacedTokenPretraining(config, other, embedding_sharing="none")
    with pytest.raises(ValueError, match="embedding_sharing is 'all': expected one of shared, gdes, none"):
        ReplacedTokenPretraining(config, embedding_sharing="all")
    with pytest.raises(ValueError, match="a bert has no detector of replaced tokens: electra, deberta-v2 have"):
        ReplacedTokenPretraining(variants.preset("bert-tiny"))


# ---------------------------------------------------------------------------------------------------- a step


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a text, a tokenizer and shards of it, and a config.json for each family."""
    place = tmp_path_factory.mktemp("rtd")
    rng = random.Random(0)
    documents = [
        "".join(
            f"every day the {animal} {WORDS[animal]} .\n" for animal in rng.choices(list(WORDS), k=rng.randint(1, 6))
        )
        for _ in range(150)
    ]
    (place / "text.txt").write_text("\n".join(documents))
    tokenizer = train_wordpiece([str(place / "text.txt")], 148, progress=False)
    save_tokenizer(tokenizer, place / "tokenizer")
    prepare([str(place / "text.txt")], tokenizer, place / "shards", progress=False)
    values = dict(
        vocab_size=148, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    for name, more in {
        "electra": dict(model_type="electra", embedding_size=16), "deberta-v2": V3, "bert": dict(model_type="bert"),
        "deberta": dict(model_type="deberta", relative_attention=True),
    }.items():  # fmt: skip
        (place / f"{name}.json").write_text(json.dumps({**values, **more}))
    return place


def loader_of(place, **changes):
    return MaskedBatches(
        Shards.open(place / "shards"),
        **{"max_seq_length": 24, "tokens_per_batch": 384, "objective": "rtd", "capacity": True, **changes},
    )


def cut(batch, parts):
    """The sequences of a batch as `parts` batches."""
    starts, B = batch.cu_seqlens.tolist(), len(batch.cu_seqlens) - 1
    batches = []
    for k in range(parts):
        first, last = k * B // parts, (k + 1) * B // parts
        rows = slice(starts[first], starts[last])
        here = (batch.picks >= starts[first]) & (batch.picks < starts[last])
        batches.append(Batch(
            batch.input_ids[rows], batch.position_ids[rows], batch.token_type_ids[rows],
            batch.cu_seqlens[first : last + 1] - starts[first], batch.max_seqlen, labels=batch.labels[rows],
            picks=batch.picks[here] - starts[first], draws=batch.draws[here],
        ))  # fmt: skip
    return batches


@pytest.mark.parametrize("case", ["electra", "deberta-v3"])
def test_cutting_a_step_into_micro_batches_changes_neither_samples_nor_gradients(case, place):
    model = ReplacedTokenPretraining(config_of(case).replace(vocab_size=148))
    [batch, *_] = loader_of(place, capacity=False).epoch(0)
    found = {}
    for parts in (1, 2, 4):
        model.zero_grad(set_to_none=True)
        sums = pretrain.accumulate(model, cut(batch, parts))
        found[parts] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sums
    gradients, sums = found[1]
    assert sums["rtd_replaced"] > 10 and sums["tokens"] == sums["rtd_count"] == len(batch.input_ids)
    for parts in (2, 4):
        assert {k: v for k, v in found[parts][1].items() if "loss" not in k} == {
            k: v for k, v in sums.items() if "loss" not in k
        }
        assert gradients.keys() == found[parts][0].keys()
        for name, gradient in gradients.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found[parts][0][name], gradient, rtol=0, atol=3e-6 * scale + 1e-7, msg=name)
    # the loss of the model's output is what was divided
    output = model(batch)
    assert output.loss.item() == pytest.approx(
        sums["loss"] / sums["count"] + 50 * sums["rtd_loss"] / sums["rtd_count"], rel=1e-5
    )


def test_masks_are_electras_and_draws_are_those_of_the_place(place):
    """85 % of the picks are [MASK], none is random; another epoch has other draws, another batch size the same."""
    picks = hidden = 0
    draws = {}
    for size in (384, 96):
        loader = loader_of(place, tokens_per_batch=size)
        for batch in loader.epoch(0):
            labels = batch.labels[batch.picks]
            known = labels != -100
            read = batch.input_ids[batch.picks][known]
            assert ((read == loader.special.mask) | (read == labels[known])).all()
            picks, hidden = picks + int(known.sum()), hidden + int((read == loader.special.mask).sum())
            assert batch.draws.dtype == torch.float64 and batch.draws.shape == batch.picks.shape
            draws.setdefault(size, []).append(batch.draws[known])
    draws = {size: torch.cat(found).sort().values for size, found in draws.items()}
    assert torch.equal(draws[384], draws[96]) and len(draws[384].unique()) == len(draws[384])
    assert abs(hidden - 0.85 * picks) < 4 * (picks * 0.85 * 0.15) ** 0.5
    assert abs(draws[384].mean() - 0.5) < 0.05 and draws[384].min() >= 0 and draws[384].max() < 1
    second = torch.cat([batch.draws for batch in loader_of(place).epoch(1)])
    assert not torch.isin(second[second > 0], draws[384]).any()


def test_an_evaluation_is_the_same_each_time_and_right(place):
    model = ReplacedTokenPretraining(config_of("electra").replace(vocab_size=148))
    loader = loader_of(place, seed=1)
    row = pretrain.evaluate(model.train(), loader)
    assert model.training and row == pretrain.evaluate(model, loader)
    replaced, scores = [], []
    with torch.no_grad():
        detector = model.eval().detector()
        for batch in loader.epoch(0):
            generator = model.generator
            hidden = generator.transform(generator.encoder(batch, rows=batch.picks))
            corrupted = model.corrupt(batch, model.sample(hidden, batch.draws))
            end = int(batch.cu_seqlens[-1])
            replaced.append(corrupted.labels[:end])
            scores.append(detector(corrupted).logits[:end])
    replaced, scores = torch.cat(replaced).bool(), torch.cat(scores)
    assert replaced.sum() > 50
    assert row["eval_rtd_loss"] == pytest.approx(
        F.binary_cross_entropy_with_logits(scores, replaced.float()).item(), rel=1e-5
    )
    assert row["eval_rtd_accuracy"] == pytest.approx(((scores > 0) == replaced).double().mean().item())
    assert row["eval_rtd_recall"] == pytest.approx((scores[replaced] > 0).double().mean().item())
    assert row["eval_rtd_baseline_accuracy"] == pytest.approx((~replaced).double().mean().item())


# ----------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def options(place, tmp_path):
    return {
        "train_file": place / "shards", "model": place / "electra.json", "objective": "rtd",
        "output_dir": tmp_path / "run", "max_seq_length": 24, "tokens_per_batch": 192,
        "gradient_accumulation_steps": 2, "max_steps": 8, "learning_rate": 3e-3, "logging_steps": 4, "eval_steps": 4,
        "save_steps": 4, "save_total_limit": 5, "eval_share": 0.1, "seed": 7,
    }  # fmt: skip


def run(options, **changes):
    return pretrain.pretrain(PretrainConfig(**options | changes))


def rows_without_times(directory):
    timing = ("elapsed", "tokens_per_second", "memory_mb")
    return [{k: v for k, v in row.items() if k not in timing} for row in report.read_metrics(directory)]


def test_it_learns_to_find_replaced_tokens(options):
    """After the generator has learned the words of the text, the discriminator knows which go together."""
    result = run(
        options, max_steps=150, learning_rate=5e-3, gradient_accumulation_steps=1, tokens_per_batch=768, dropout=0.0,
        eval_steps=150, save_steps=150, schedule="constant",
    )  # fmt: skip
    assert result["eval_rtd_accuracy"] > result["eval_rtd_baseline_accuracy"] + 0.04
    assert result["eval_rtd_recall"] > 0.5
    assert 0.8 < result["eval_rtd_baseline_accuracy"] < 1
    losses = [row["rtd_loss"] for row in report.read_metrics(options["output_dir"]) if "rtd_loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    assert result["eval_rtd_loss"] < 0.7 * entropy(1 - result["eval_rtd_baseline_accuracy"])


def entropy(share):
    """The least loss of one that knows what share of the tokens is replaced, and nothing of which."""
    return -share * math.log(share) - (1 - share) * math.log(1 - share)


@pytest.mark.parametrize(("case", "sharing"), [("deberta-v3", "gdes"), ("deberta-v3", "none"), ("electra", "gdes")])
def test_beside_a_generator_that_stands_still_the_discriminator_must_learn(case, sharing, place):
    """Both learning, DeBERTa's generator soon knows this text by heart, and there is nothing left to find."""
    torch.manual_seed(0)
    model = ReplacedTokenPretraining(config_of(case).replace(vocab_size=148), embedding_sharing=sharing)
    before = {name: p.detach().clone() for name, p in model.generator.named_parameters() if "embeddings" not in name}
    optimizer = torch.optim.AdamW(model.discriminator.parameters(), lr=3e-3)
    batches = [batch for epoch in range(4) for batch in loader_of(place).epoch(epoch)][:60]
    sums = []
    for batch in batches:
        sums.append(pretrain.accumulate(model, [batch]))
        optimizer.step()
        model.zero_grad()
    first, last = ({k: sum(x[k] for x in some) for k in some[0]} for some in (sums[:10], sums[-10:]))
    assert last["rtd_loss"] / last["rtd_count"] < 0.6 * entropy(last["rtd_replaced"] / last["rtd_count"])
    assert last["rtd_found"] > 0.4 * last["rtd_replaced"] and last["rtd_loss"] < 0.6 * first["rtd_loss"]
    assert all(torch.equal(x, model.generator.get_parameter(name)) for name, x in before.items())


@pytest.mark.parametrize("family", ["electra", "deberta-v2"])
def test_what_a_run_leaves_loads_in_transformers(family, options, place, capsys):
    result = run(options, model=place / f"{family}.json")
    directory = options["output_dir"]
    row = report.read_metrics(directory)[0]
    assert row["rtd_loss"] > 0 and 0 <= row["rtd_recall"] <= 1 and 0.8 < row["rtd_baseline_accuracy"] < 1
    assert f"replaced tokens found {result['eval_rtd_recall']:.1%}" in capsys.readouterr().err
    card = (directory / "README.md").read_text()
    for name in ("recall", "accuracy", "baseline_accuracy"):
        assert f"{result['eval_rtd_' + name]:.2%}" in card
    assert "ReplacedTokenDetector" in card and "fill-mask" in card and (directory / "learning_curve.png").exists()

    names = {"electra": ("ElectraForPreTraining", "ElectraForMaskedLM"),
             "deberta-v2": ("DebertaV2Model", "DebertaV2ForMaskedLM")}[family]  # fmt: skip
    for place_, name in zip((directory, directory / "generator"), names):
        theirs, info = getattr(transformers, name).from_pretrained(place_, output_loading_info=True)
        if name == "DebertaV2Model":
            assert {key.split(".")[0] for key in info.pop("unexpected_keys")} == {"discriminator_predictions"}
        assert not any(info.values()), info
        assert transformers.AutoTokenizer.from_pretrained(place_).mask_token == "[MASK]"
    ours = ReplacedTokenDetector.from_pretrained(directory)
    ids = torch.randint(5, 100, (2, 9))
    theirs = getattr(transformers, names[0]).from_pretrained(directory).eval()
    if family == "electra":
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    else:
        batch, _ = pack_inputs(ours.config, ids)
        expected = theirs(ids).last_hidden_state.flatten(0, 1)
        torch.testing.assert_close(ours.encoder(batch), expected, atol=1e-5, rtol=1e-5)
    # the tables: one, or a sum whose parts have both moved
    generator = MaskedLM.from_pretrained(directory / "generator")
    tables = [model.encoder.embeddings.word.weight for model in (ours, generator)]
    difference = (tables[0] - tables[1]).abs().max()
    assert difference == 0 if family == "electra" else tables[1].abs().max() > difference > 1e-4
    [words] = fill_mask(*load(directory / "generator"), "every day the [MASK] chases mice")
    assert len(words) == 5
    # going on from it begins with what it knows
    whole = ReplacedTokenPretraining.from_pretrained(directory)
    again = pretrain._model(PretrainConfig(**options | {"model": directory}), ours.config)
    for state in (whole.state_dict(), again.state_dict()):
        assert torch.equal(state["discriminator.dense.weight"], ours.dense.weight)
        assert torch.equal(state["generator.vocabulary_bias"], generator.vocabulary_bias)
    torch.testing.assert_close(again.detector().encoder.embeddings.word.weight, tables[0])


@pytest.mark.parametrize(
    ("family", "sharing"), [("electra", None), ("electra", "none"), ("electra", "gdes"), ("deberta-v2", None)]
)
def test_a_stopped_run_resumes_to_the_bit(family, sharing, options, place, tmp_path, monkeypatch):
    options |= {"model": place / f"{family}.json", "embedding_sharing": sharing}
    run(options, output_dir=tmp_path / "whole")
    real, calls = pretrain.accumulate, []

    def accumulate(*args, **kwargs):
        calls.append(None)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "accumulate", accumulate)
        assert run(options)["signal"] == signal.SIGTERM
    assert checkpoint.latest(options["output_dir"]).name == "checkpoint-6"
    run(options, resume=True)
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER, "generator/" + checkpoint.MODEL):
        tensors = [load_file(d / "checkpoint-8" / name) for d in (tmp_path / "whole", options["output_dir"])]
        assert tensors[0].keys() == tensors[1].keys() and tensors[0]
        for key, value in tensors[0].items():
            assert torch.equal(value, tensors[1][key]), key
    assert rows_without_times(tmp_path / "whole") == rows_without_times(options["output_dir"])


def test_a_damaged_generator_damages_its_checkpoint(options):
    run(options, max_steps=8)
    directory = options["output_dir"]
    file = directory / "checkpoint-8" / "generator" / checkpoint.MODEL
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.warns(UserWarning, match="passed over: .*checkpoint-8/generator/model.safetensors is damaged"):
        assert checkpoint.latest(directory).name == "checkpoint-4"


def worker(rank, world_size, file, options):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    report._tensorboard = lambda *_: None
    run(options)
    torch.distributed.destroy_process_group()


def test_two_processes_learn_what_one_does_with_two_micro_batches(options, tmp_path):
    options = options | {"dropout": 0.0, "max_steps": 3, "gradient_accumulation_steps": 1, "logging_steps": 3}
    run(options, output_dir=tmp_path / "one", gradient_accumulation_steps=2)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=worker, args=(rank, 2, tmp_path / "rendezvous", options)) for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    for name in (checkpoint.MODEL, "generator/" + checkpoint.MODEL):
        one, two = (load_file(d / name) for d in (tmp_path / "one", options["output_dir"]))
        for key in one:
            torch.testing.assert_close(one[key], two[key], atol=2e-5, rtol=1e-4, msg=key)
    first, second = (report.read_metrics(d)[0] for d in (tmp_path / "one", options["output_dir"]))
    assert first["rtd_loss"] == pytest.approx(second["rtd_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "bert.json"},
            "--objective rtd: a bert has no detector of replaced tokens, electra, deberta-v2",
        ),
        ({"model": "deberta.json"}, "--objective rtd: a deberta has no detector of replaced tokens"),
        ({"rtd_weight": 0.0}, "--rtd-weight is 0.0: expected a number above 0"),
        ({"rtd_weight": -50.0}, "--rtd-weight is -50.0"),
        ({"rtd_weight": float("nan")}, "--rtd-weight is nan"),
        ({"embedding_sharing": "es"}, "--embedding-sharing is 'es': expected one of shared, gdes, none"),
        ({"objective": "mlm", "embedding_sharing": "gdes"}, "--embedding-sharing goes with --objective rtd"),
        ({"model": "tokenizer"}, "is not a readable JSON file"),
        ({"model": "lone"}, "--objective rtd: .*lone has no generator, expected one in .*lone/generator"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_said_before_any_work(changes, message, options, place, monkeypatch):
    monkeypatch.setattr(pretrain, "_model", lambda *_: pytest.fail("work was begun"))
    if not (place / "lone").exists():
        ReplacedTokenDetector(variants.read_config(place / "electra.json")).save_pretrained(place / "lone")
    if "model" in changes:
        changes = changes | {"model": place / changes["model"]}
    with pytest.raises(ValueError, match=message) as error:
        run(options, **changes)
    assert "\n" not in str(error.value)
