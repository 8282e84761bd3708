"""Planted faults: each must turn the tests of its wing red. `make mutants` runs them; they are no part of the suite.

    python tests/mutants.py                     # all
    python tests/mutants.py pair-labels         # those named

A fault is planted in a copy of what git tracks. One whose text is no longer in its file exactly once is an error: it
has to be brought up to date.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# for one fault's tests, which take seconds
TIME_LIMIT = 300
LEFT_OUT = "benchmarks/results/"


class Mutant(NamedTuple):
    name: str
    file: str
    text: str
    replacement: str
    # a test of the fault's wing, or several: an argument of pytest
    tests: str


MUTANTS = [
    # kernels
    Mutant(
        "attention-mask-forgotten",
        "kernels/attention.py",
        "return offs_n[None, :] < length",
        "return offs_n[None, :] < length + BLOCK_N",
        "tests/kernels/test_attention.py::test_longest_short_and_several_tiles",
    ),
    Mutant(
        "attention-online-softmax-not-rescaled",
        "kernels/attention.py",
        "acc * alpha[:, None]",
        "acc",
        "tests/kernels/test_attention.py::test_longest_short_and_several_tiles",
    ),
    Mutant(
        "attention-lse-without-the-maximum",
        "kernels/_attention.py",
        "highest + tl.log2(total)",
        "tl.log2(total)",
        "tests/kernels/test_attention.py::test_bfloat16",
    ),
    Mutant(
        "attention-dq-off-by-1-percent",
        "kernels/attention.py",
        "dq *= scale * keep_scale",
        "dq *= 1.01 * scale * keep_scale",
        "tests/kernels/test_attention.py::test_longest_short_and_several_tiles",
    ),
    Mutant(
        "disentangled-attention-dk-of-the-wrong-rows",
        "kernels/disentangled_attention.py",
        "tl.dot(shift_keys(ds, BLOCK), query_band, dk,",
        "tl.dot(tl.trans(shift_queries(ds, BLOCK)), query_band, dk,",
        "tests/kernels/test_disentangled_attention.py::test_lengths_at_the_edges_of_tiles",
    ),
    Mutant(
        "layer-norm-dbias-off-by-1-percent",
        "kernels/layer_norm.py",
        "(dbias[i] + dy,)",
        "(dbias[i] + 1.01 * dy,)",
        "tests/kernels/test_layer_norm.py::test_values_and_gradients",
    ),
    Mutant(
        "layer-norm-backward-draws-another-mask",
        "kernels/layer_norm.py",
        "offset, threshold, BLOCK_D)\n                z = ",
        "offset + 1, threshold, BLOCK_D)\n                z = ",
        "tests/kernels/test_layer_norm.py::test_values_and_gradients",
    ),
    Mutant(
        "column-sums-leave-out-the-last-program",
        "kernels/_column_sums.py",
        "mask=(row < programs) & mask_d",
        "mask=(row < programs - 1) & mask_d",
        "tests/kernels/test_layer_norm.py::test_more_rows_than_programs",
    ),
    Mutant(
        "bias-gelu-last-tile-not-stored",
        "kernels/bias_gelu.py",
        "gelu(x, TANH), mask=mask)",
        "gelu(x, TANH), mask=mask & (offs_f < F // BLOCK_F * BLOCK_F))",
        "tests/kernels/test_bias_gelu.py::test_values_and_gradients",
    ),
    Mutant(
        "gelu-derivative-off-by-1-percent",
        "kernels/_math.py",
        "0.3989422804014327 * x * density",
        "0.403 * x * density",
        "tests/kernels/test_gelu_layer_norm.py::test_values_and_gradients",
    ),
    Mutant(
        "gated-activation-halves-of-the-gradient-swapped",
        "kernels/gated_activation.py",
        "tl.store(out + GATE, dy",
        "tl.store(out + F - GATE, dy",
        "tests/kernels/test_gated_activation.py::test_values_and_gradients",
    ),
    Mutant(
        "rms-norm-mean-over-the-tiles",
        "kernels/rms_norm.py",
        "row_sum(products) / D",
        "row_sum(products) / (TILES * BLOCK_D)",
        "tests/kernels/test_rms_norm.py::test_values_and_gradients",
    ),
    Mutant(
        "embedding-dbias-at-the-wrong-offset",
        "kernels/embedding.py",
        "out + (1 + TYPES) * D, tl.sum(dbias",
        "out + TYPES * D, tl.sum(dbias",
        "tests/kernels/test_embedding.py::test_numbers_of_types",
    ),
    Mutant(
        "embedding-padding-row-learns",
        "kernels/embedding.py",
        "inside = inside & (key != skipped_key)",
        "inside = inside & (key > skipped_key - T)",
        "tests/kernels/test_embedding.py::test_the_padding_row_gets_no_gradient",
    ),
    Mutant(
        "cross-entropy-words-past-the-vocabulary",
        "kernels/cross_entropy.py",
        'x = tl.where(start + offs_v < V, x, -float("inf"))',
        "x = x * 1.0",
        "tests/kernels/test_cross_entropy.py::test_few_words",
    ),
    Mutant(
        "cross-entropy-ignored-rows-have-a-gradient",
        "kernels/cross_entropy.py",
        "tl.where((label != ignore_index)[:, None], dlogits, 0.0)",
        "dlogits",
        "tests/kernels/test_cross_entropy.py::test_against_torch",
    ),
    Mutant(
        "pooling-slack-rows-not-zeroed",
        "kernels/pooling.py",
        "range(tl.maximum(start, last), stop_chunk, BLOCK_T)",
        "range(tl.maximum(start, last) + 1, stop_chunk, BLOCK_T)",
        "tests/kernels/test_pooling.py::test_many_slack_rows",
    ),
    Mutant(
        "vocabulary-max-of-the-padding",
        "kernels/vocabulary_max.py",
        'logits = tl.where(mask_t[None, :], logits, -float("inf"))',
        "logits = logits * 1.0",
        "tests/kernels/test_vocabulary_max.py::test_the_formula_of_sentence_transformers",
    ),
    # ops
    Mutant(
        "ids-outside-their-table-pass",
        "fastbert/values.py",
        "is_known = ids.clamp(0, rows - 1) == ids",
        "is_known = ids.clamp(0, rows) == ids",
        "tests/test_ops.py::test_an_id_outside_its_table_is_named",
    ),
    # retrieval
    Mutant(
        "false-negatives-are-punished",
        "fastbert/model/retrieval.py",
        "return torch.tensor(pairs) if pairs else None",
        "return None",
        "tests/model/test_retrieval.py::test_false_negatives",
    ),
    Mutant(
        "excluded-pairs-of-later-chunks-are-negatives",
        "kernels/cross_entropy.py",
        "rows = pairs[:, 0] - start",
        "rows = pairs[:, 0]",
        "tests/kernels/test_contrastive_cross_entropy.py::test_excluded_pairs_are_no_negatives",
    ),
    Mutant(
        "a-constant-ranking-is-a-good-one",
        "fastbert/tasks/embed.py",
        "(~(row < value)).sum()",
        "(row > value).sum()",
        "tests/tasks/test_retrieval_files.py::test_a_constant_and_a_broken_model_are_not_good",
    ),
    # cpu: its functions are tested beside the kernels of the same ops
    Mutant(
        "cpu-attention-dk-off-by-1-percent",
        "fastbert/cpu/attention.py",
        "bmm(ds.transpose(1, 2), queries)",
        "bmm(ds.transpose(1, 2), queries * 1.01)",
        "tests/cpu/test_cpu_attention.py::test_in_cache",
    ),
    Mutant(
        "cpu-dropout-forgets-the-offset",
        "fastbert/cpu/dropout.py",
        "np.uint64(offset << 32)",
        "np.uint64(0)",
        "tests/cpu/test_cpu_attention.py::test_in_cache",
    ),
    Mutant(
        "cpu-disentangled-attention-mask-forgotten",
        "fastbert/cpu/disentangled_attention.py",
        "masked_fill_(~group.mask.transpose(0, 1),",
        "masked_fill_(~group.mask.transpose(0, 1) & False,",
        "tests/cpu/test_cpu_attention.py::test_disentangled",
    ),
    Mutant(
        "cpu-groups-scatter-to-the-wrong-rows",
        "fastbert/cpu/groups.py",
        "back[slots[filled]] = filled",
        "back[slots[filled]] = filled.roll(1)",
        "tests/cpu/test_cpu_attention.py::test_in_groups",
    ),
    Mutant(
        "cpu-cross-entropy-counts-ignored-rows",
        "fastbert/cpu/cross_entropy.py",
        "losses.masked_fill(~labelled, 0)",
        "losses * 1.0",
        "tests/kernels/test_cross_entropy.py::test_several_chunks_on_a_cpu",
    ),
    Mutant(
        "cpu-pooling-last-token-is-the-one-before",
        "fastbert/cpu/pooling.py",
        "[end - 1 for end in starts[1:]]",
        "[max(end - 2, 0) for end in starts[1:]]",
        "tests/kernels/test_pooling.py::test_the_formulas_of_sentence_transformers",
    ),
    Mutant(
        "inference-stale-weights",
        "fastbert/cpu/inference.py",
        "if stamp == self.stamp and torch.equal(torch.cat(self.samples), self.sampled):",
        "if stamp == self.stamp:",
        "tests/cpu/test_inference.py::test_changed_weights_are_read_again",
    ),
    Mutant(
        "inference-residual-forgotten",
        "fastbert/cpu/inference.py",
        "down(up(x, self.approximate)).add_(x)",
        "down(up(x, self.approximate))",
        "tests/cpu/test_inference.py::test_values",
    ),
    Mutant(
        "int8-saturates",
        "fastbert/cpu/low_precision.py",
        "    return abs(_int8_product(",
        "    return 0 > abs(_int8_product(",
        "tests/cpu/test_low_precision.py::test_the_largest_numbers_do_not_overflow",
    ),
    Mutant(
        "int8-stale-weights",
        "fastbert/cpu/low_precision.py",
        " or not torch.equal(found[1], sampled):",
        ":",
        "tests/cpu/test_low_precision.py::test_changed_weights_are_packed_again",
    ),
    Mutant(
        "int8-smallest-value-forgotten",
        "fastbert/cpu/low_precision.py",
        "torch.addcmul(bias, lo, sums)",
        "bias + 0 * lo * sums",
        "tests/cpu/test_low_precision.py::test_int8_is_exact_up_to_its_two_roundings",
    ),
    Mutant(
        "resume-in-another-dtype",
        "fastbert/training/processes.py",
        "        return then\n",
        "        pass\n",
        "tests/training/test_resume.py::test_a_run_keeps_its_dtype_on_another_machine",
    ),
    Mutant(
        "library-of-the-checkpoint-forgotten",
        "fastbert/cpu/libraries.py",
        "if name in _restored:",
        "if not name:",
        "tests/cpu/test_libraries.py::test_a_resumed_run_goes_on_as_it_began",
    ),
    # data
    Mutant(
        "masking-rate-off-by-2-percent",
        "fastbert/data/masking.py",
        "np.floor(counts * probability +",
        "np.floor(counts * probability * 0.98 +",
        "tests/data/test_masking.py::test_how_many_are_picked",
    ),
    Mutant(
        "masking-random-words-too-often",
        "fastbert/data/masking.py",
        "BERT_FATES, ELECTRA_FATES = (0.8, 0.9),",
        "BERT_FATES, ELECTRA_FATES = (0.8, 0.92),",
        "tests/data/test_masking.py::test_80_10_10",
    ),
    Mutant(
        "pair-labels-turned-around",
        "fastbert/data/batches.py",
        "lengths, false.astype(np.int64)",
        "lengths, (~false).astype(np.int64)",
        "tests/data/test_batches.py::test_pairs",
    ),
    Mutant(
        "resume-in-the-middle-forgets-the-ranks",
        "fastbert/data/batches.py",
        "self.rank + start * self.world_size",
        "self.rank + start",
        "tests/data/test_batches.py::test_ranks_share_an_epoch",
    ),
    Mutant(
        "damaged-shards-count-as-whole",
        "fastbert/data/shards.py",
        '"" if found == digest else',
        '"" if found else',
        "tests/data/test_shards.py::test_damaged_shards_are_made_again",
    ),
    Mutant(
        "long-sentences-cut-anywhere",
        "fastbert/data/encoding.py",
        "return len(ids) if ends else 0",
        "return len(ids)",
        "tests/data/test_encoding.py::test_the_ids_of_a_long_sentence_are_those_of_the_whole",
    ),
    # training
    Mutant(
        "loss-divided-by-the-micro-batch-count",
        "fastbert/training/step_sums.py",
        "output.divided(counts)",
        "output.divided(model.label_counts(batch))",
        "tests/training/test_loop.py::test_cutting_a_step_into_micro_batches_does_not_change_its_gradient",
    ),
    Mutant(
        "gradient-not-clipped",
        "fastbert/training/optim.py",
        "max_norm / norm, 1.0)",
        "1.0, 1.0)",
        "tests/training/test_optim.py::test_clipping_is_by_the_common_norm",
    ),
    Mutant(
        "checkpoint-forgets-the-window",
        "fastbert/training/loop.py",
        '{"progress": asdict(progress), "products"',
        '{"progress": asdict(progress) | {"window": {}}, "products"',
        "tests/training/test_resume.py::test_a_stopped_run_resumes_to_the_bit",
    ),
    # swapping
    Mutant(
        "swap-drops-a-hook",
        "fastbert/swapping/steps.py",
        "and not any(vars(module)[kind] for kind in HOOKS)\n",
        "",
        "tests/swapping/test_swap_models.py::test_a_hook_that_changes_something_changes_it",
    ),
    Mutant(
        "swap-unpads-over-a-hook",
        "fastbert/swapping/stacks.py",
        "if layout is None or is_watched(self, hooks=not is_flat) or _own_attention(self):",
        "if layout is None:",
        "tests/swapping/test_own_code.py::test_hooks_that_mix_tokens",
    ),
    Mutant(
        "swap-leaves-padding-as-it-is",
        "fastbert/swapping/stacks.py",
        "x.masked_fill(padding[..., None], 0)",
        "x",
        "tests/swapping/test_swap_peers.py::test_padded_places_are_zero_however_it_is_called",
    ),
    Mutant(
        "swap-loss-is-a-mean-of-means",
        "fastbert/swapping/losses.py",
        "count if num_items is None else num_items",
        "count",
        "tests/swapping/test_swap.py::test_the_loss_is_divided_by_the_labels_of_the_whole_step",
    ),
    Mutant(
        "swap-prepared-under-dropout",
        "fastbert/swapping/inference.py",
        "if drops or not all(",
        "if not all(",
        "tests/swapping/test_swapped_speed.py::test_dropout_that_is_on_in_evaluation_drops",
    ),
    # tasks
    Mutant(
        "tasks-worst-model-kept",
        "fastbert/training/finetune.py",
        "direction * score <= direction * best",
        "direction * score >= direction * best",
        "tests/training/test_finetune.py::test_the_best_step",
    ),
    Mutant(
        "lora-dropout-as-it-comes",
        "fastbert/training/lora.py",
        "if seed is None:",
        "if True:",
        "tests/training/test_lora.py::test_a_stopped_run_resumes_to_the_bit",
    ),
    Mutant(
        "smoothing-over-what-fills-up",
        "fastbert/model/losses.py",
        "is_label.sum(-1).clamp(min=1)",
        "is_label.shape[-1]",
        "tests/model/test_packed_heads.py::test_smoothing_is_over_the_labels_that_a_row_has",
    ),
    Mutant(
        "faulty-rows-out-of-place",
        "fastbert/tasks/predictor.py",
        "while faulty and faulty[0][0] < example.number:",
        "while False:",
        "tests/tasks/test_predictor.py::test_rows_with_other_columns_keep_their_place",
    ),
    Mutant(
        "tasks-null-threshold-not-chosen",
        "fastbert/tasks/answer.py",
        'found["null_threshold"] = spec.settings.get("null_threshold", 0.0)',
        'spec.settings["null_threshold"] = found["null_threshold"] = 0.0',
        "tests/tasks/test_answer.py",
    ),
]


def copy_tree(place):
    """Copy what git tracks, as it is now, but for the benchmarks' results."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name and not name.startswith(LEFT_OUT) and (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, place / name)


def run_tests(place, tests, **options):
    """pytest on `tests` in the copy."""
    # Python recognises a stale compiled file by time in seconds and size, which a fault may not change
    environment = os.environ | {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=place, env=environment, text=True, check=False, **options)


def check(mutant, place):
    """What is wrong with an entry of the table, or None."""
    path = place / mutant.file
    count = path.read_text(encoding="utf-8").count(mutant.text) if path.is_file() else 0
    if count != 1:
        return f"{mutant.name}: {mutant.text!r} stands {count} times in {mutant.file}: expected once"
    return None


def judge(mutant, place):
    """(whether the tests are red, what to say of them)."""
    path = place / mutant.file
    source = path.read_text(encoding="utf-8")
    path.write_text(source.replace(mutant.text, mutant.replacement), encoding="utf-8")
    try:
        done = run_tests(place, [mutant.tests], capture_output=True, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return False, f"no end within {TIME_LIMIT} s"
    finally:
        path.write_text(source, encoding="utf-8")
    if done.returncode == 1:
        return True, "red"
    if done.returncode == 0:
        return False, "GREEN: no test sees it"
    return False, f"its tests did not run: {((done.stdout + done.stderr).strip().splitlines() or [''])[-1]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="mutants to run (all by default)")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"no mutant named {', '.join(sorted(unknown))}")
    mutants = [mutant for mutant in MUTANTS if not arguments.names or mutant.name in arguments.names]
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        copy_tree(place)
        wrong = [fault for mutant in mutants if (fault := check(mutant, place))]
        if wrong:
            sys.exit("\n".join(wrong))
        print("without a fault:", flush=True)
        if run_tests(place, dict.fromkeys(mutant.tests for mutant in mutants)).returncode:
            sys.exit("these tests do not pass without a fault")
        survivors = []
        for i, mutant in enumerate(mutants, 1):
            started = time.monotonic()
            is_red, said = judge(mutant, place)
            if not is_red:
                survivors.append(mutant.name)
            print(f"[{i}/{len(mutants)}] {mutant.name}: {said} ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} faults turn their tests red")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
