"""Figures against scikit-learn's and scipy's own, by hand at their edges: ties, labels that never occur, constants."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from fastbert.tasks import classify, multilabel, regress
from fastbert.tasks.examples import Example, Spec

LABELS = ("art", "sport", "tech", "void")


def classified(probabilities, golds, **settings):
    spec = Spec("classify", LABELS, settings=settings)
    examples = [Example(i, ("",), gold) for i, gold in enumerate(golds, 1)]
    with np.errstate(divide="ignore"):
        logits = [[np.log(np.array(row))] for row in probabilities]
    return examples, [classify.decode(e, [], one, spec) for e, one in zip(examples, logits)], spec


def test_classify():
    draw = np.random.default_rng(0)
    probabilities = draw.dirichlet(np.ones(4) * 0.7, size=60)
    golds = [LABELS[i] for i in draw.integers(0, 3, 60)]
    found = classify.score(*classified(probabilities, golds))
    best = [LABELS[i] for i in probabilities.argmax(1)]
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(golds, best))
    # over the labels that occur in gold or prediction
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(golds, best, average="macro"))
    assert found["mcc"] == pytest.approx(metrics.matthews_corrcoef(golds, best))
    assert found["log_loss"] == pytest.approx(metrics.log_loss(golds, probabilities, labels=LABELS))
    report = metrics.classification_report(golds, best, output_dict=True, labels=LABELS, zero_division=0.0)
    for label in LABELS:
        for ours, theirs in {
            "precision": "precision",
            "recall": "recall",
            "f1": "f1-score",
            "support": "support",
        }.items():
            assert found["per_class"][label][ours] == pytest.approx(report[label][theirs])


def test_a_constant_has_no_correlation():
    assert classify.correlation(np.array([1, 1, 0]), np.array([1, 1, 1])) == 0.0
    assert classify.correlation(np.array([1, 0]), np.array([1, 0])) == 1.0


def test_a_tie_is_the_first_labels():
    _, (one,), _ = classified([[0.3, 0.3, 0.3, 0.1]], ["tech"])
    assert one["label"] == "art" and one["score"] == pytest.approx(0.3) and one["_error"] == pytest.approx(0.3)


def test_a_confidence_at_the_border_is_in_the_bin_below():
    # (0.2, 0.3] holds 0.3 and (0.3, 0.4] holds 0.35: |1 - 0.3| and |0 - 0.35|, half each
    error = classify.calibration_error(np.array([0.1 + 0.2, 0.35]), np.array([True, False]))
    assert error == pytest.approx((0.7 + 0.35) / 2)


def test_the_temperature_has_the_smallest_loss():
    draw = np.random.default_rng(1)
    scores = draw.normal(size=(400, 4))
    golds = [LABELS[(draw.random(4) ** (1 / np.exp(row))).argmax()] for row in scores]
    probabilities = classify.softmax(5 * scores)
    examples, predictions, spec = classified(probabilities, golds)
    before = classify.score(examples, predictions, spec, tune=True)
    # the labels were drawn with the logits themselves, and the model shouts five times as loud
    assert spec.settings["temperature"] == pytest.approx(5, rel=0.2)
    examples, predictions, spec = classified(probabilities, golds, applied_temperature=spec.settings["temperature"])
    after = classify.score(examples, predictions, spec)
    assert after["log_loss"] < before["log_loss"] and after["calibration_error"] < before["calibration_error"]
    assert after["accuracy"] == before["accuracy"]


def several(gold, values, thresholds=None):
    names = tuple("abcd"[: gold.shape[1]])
    spec = Spec("multilabel", names, settings={"thresholds": dict(zip(names, thresholds or ()))})
    examples = [Example(i, ("",), tuple(name for name, one in zip(names, row) if one)) for i, row in enumerate(gold, 1)]
    logits = [[np.log(row / (1 - row))] for row in values]
    return examples, [multilabel.decode(e, [], one, spec) for e, one in zip(examples, logits)], spec


def test_multilabel():
    draw = np.random.default_rng(2)
    gold = draw.random((50, 4)) < [0.5, 0.2, 0.8, 0.0]
    # rounded: many equal values, some at the threshold
    values = np.clip(np.round(gold * 0.3 + draw.random((50, 4)) * 0.7, 1), 0.05, 0.95)
    found = multilabel.score(*several(gold, values))
    chosen = values >= 0.5 - 1e-12
    for name, average in (("micro_f1", "micro"), ("macro_f1", "macro"), ("samples_f1", "samples")):
        assert found[name] == pytest.approx(metrics.f1_score(gold, chosen, average=average, zero_division=0.0)), name
    assert found["exact_match"] == pytest.approx(metrics.accuracy_score(gold, chosen))
    # the last label has no positive
    wanted = metrics.average_precision_score(gold[:, :3], values[:, :3], average="macro")
    assert found["map"] == pytest.approx(wanted) and found["per_class"]["d"]["average_precision"] is None


def test_thresholds_are_the_best_of_all():
    draw = np.random.default_rng(3)
    gold = draw.random((40, 3)) < [0.1, 0.5, 0.0]
    values = np.clip(np.round(gold * 0.2 + draw.random((40, 3)) * 0.6, 1), 0.05, 0.95)
    examples, predictions, spec = several(gold, values)
    found = multilabel.score(examples, predictions, spec, tune=True)
    for i, name in enumerate("ab"):
        scores = [metrics.f1_score(gold[:, i], values[:, i] >= t) for t in np.arange(0.01, 1, 0.01)]
        assert found["per_class"][name]["f1"] == pytest.approx(max(scores))
    assert spec.settings["thresholds"]["c"] == 0.5
    assert predictions[0]["labels"] == [
        name for i, name in enumerate("abc") if values[0, i] >= spec.settings["thresholds"][name]
    ]


def regression(gold, values):
    examples = [Example(i, ("",), value) for i, value in enumerate(gold, 1)]
    return regress.score(examples, [{"score": value} for value in values], Spec("regress", ()))


def test_regress():
    gold, values = [0.0, 1.0, 1.0, 2.5, 5.0], [0.5, 0.5, 1.5, 2.0, 2.0]
    found = regression(gold, values)
    assert found["pearson"] == pytest.approx(stats.pearsonr(gold, values)[0])
    assert found["spearman"] == pytest.approx(stats.spearmanr(gold, values)[0])
    assert found["mse"] == pytest.approx(metrics.mean_squared_error(gold, values))


def test_a_correlation_with_a_constant_is_undefined():
    found = regression([1.0, 2.0], [3.0, 3.0])
    assert found["pearson"] is None and found["spearman"] is None and found["mse"] == pytest.approx(2.5)
    assert regression([1.0], [1.0])["pearson"] is None
