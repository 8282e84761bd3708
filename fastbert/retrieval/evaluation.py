"""How well a model finds documents, orders candidates, or tells how similar two texts are."""

import json
import os
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from .. import files, hub
from ..model.sentences import SentenceEmbedder
from ..tasks import regress, results
from ..tasks.examples import Notes, Spec, chunks
from ..tasks.predictor import Predictor, load
from . import folders, scores
from .embedding import CHUNK, TOKENS_PER_BATCH, check_finite, chunks_of, load_embedder, progress
from .search import SIMILARITIES, Best

TASKS = ("embed", "rerank")
# as sentence-transformers looks for them
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
# pairs of a query and a candidate that are read and scored at a time
PAIRS = 4096


def task_of(directory: str | os.PathLike, paths: Iterable[str], revision: str | None = None) -> str | None:
    """The one of TASKS that `fastbert evaluate --task auto` means; None for the scores of a fine-tuned model."""
    directory = hub.local(directory, revision)
    if any(map(folders.is_folder, paths)):
        path = directory / "config.json"
        architectures = files.read_json(path).get("architectures") if path.is_file() else None
        return "rerank" if str((architectures or [""])[0]).endswith("ForSequenceClassification") else "embed"
    is_embedder = (directory / "modules.json").is_file() and not (directory / "task.json").is_file()
    return "embed" if is_embedder else None


def evaluate(task, model, paths, candidates, loading, columns, keep_self, **how):
    """What `fastbert evaluate` does for one of TASKS: the arguments are its options. Raises ValueError."""
    if len(paths) != 1:
        raise ValueError(f"--input names {len(paths)} paths: expected one for --task {task}")
    if task == "embed":
        if candidates:
            raise ValueError("--candidates goes with --task rerank")
        return evaluate_embedder(load_embedder(model, **loading), *paths, keep_self=keep_self, **columns, **how)
    if not candidates:
        raise ValueError("--task rerank needs --candidates: a run of TREC, or a model that finds documents")
    if os.path.isdir(candidates) or not os.path.isfile(candidates) and hub.is_name(candidates):
        candidates = load_embedder(candidates, **loading | {"revision": None})
    elif not os.path.isfile(candidates):
        raise FileNotFoundError(f"no such file or folder: {candidates}")
    return evaluate_reranker(load(model, **loading), *paths, candidates, **how)


def evaluate_embedder(
    model: SentenceEmbedder, path: str | os.PathLike, *, text_columns: Iterable[str] = (),
    label_column: str | None = None, keep_self: bool = False, output_dir: str | os.PathLike | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict:  # fmt: skip
    """The scores of an embedder, as JSON has them, each with the interval of 95 % of a bootstrap over queries or pairs.

    path: a folder of BEIR: see folders.py, and scores.py for the scores. Queries get the model's prompt "query", the
    corpus its "document", "passage" or "corpus", if it has one. The search is exact, by the model's own similarity; of
    equal scores, the greater id comes first, as in trec_eval. A document with the id of the query is left out as in
    BEIR, unless it is judged for this query, or with keep_self. Or path is a table of two texts and a score (STS):
    correlations. output_dir: where to write metrics.json, and for a folder run.trec, 100 documents a query, and
    queries.jsonl. say: is told what is odd about the files. Raises ValueError for what cannot be read.
    """
    if not folders.is_folder(path):
        metrics = _similarity(model, os.fspath(path), text_columns, label_column, say)
        if output_dir is not None:
            _write(output_dir, metrics)
        return metrics
    folder = folders.read_folder(path)
    for remark in folder.remarks:
        say(f"{path}: {remark}")
    found, more = _search(model, folder, keep_self, say)
    return _ranked(folder, found, {"task": "embed"}, more, output_dir)


def evaluate_reranker(
    predictor: Predictor, path: str | os.PathLike, candidates: str | os.PathLike | SentenceEmbedder, *,
    output_dir: str | os.PathLike | None = None, say: Callable[[str], None] = lambda line: None,
) -> dict:  # fmt: skip
    """The scores of a cross-encoder that orders candidates, with those of the candidates' own order.

    predictor: of `fastbert.load`, a model with one number for a pair of texts. path: a folder of BEIR. candidates: a
    run of TREC, or a model that finds 100 documents a query. A query without candidates has scores of 0. For the rest
    see `evaluate_embedder`.
    """
    if predictor.task.__name__.rpartition(".")[2] not in ("regress", "rerank"):
        raise ValueError(f"the model's task is {predictor.spec.task}: expected one number for a pair of texts")
    folder = folders.read_folder(path)
    for remark in folder.remarks:
        say(f"{path}: {remark}")
    if isinstance(candidates, SentenceEmbedder):
        found, _ = _search(candidates, folder, False, say)
        before = {query: folders.ranked(one) for query, one in found.items()}
    else:
        before = _candidates(candidates, folder, say)
    wanted = set(chain.from_iterable(before.values()))
    documents = {identity: text for _, identity, text in folder.corpus() if identity in wanted}
    after = {query: {} for query in folder.queries}
    pairs = [(query, document) for query, ranking in before.items() for document in ranking]
    with progress(len(pairs), 0) as show:
        for start in range(0, len(pairs), PAIRS):
            block = pairs[start : start + PAIRS]
            numbers = predictor.predict([(folder.queries[query], documents[document]) for query, document in block])
            for (query, document), one in zip(block, numbers, strict=True):
                if not np.isfinite(one["score"]):
                    raise ValueError(f"the score of query {query!r} and document {document!r} is not finite")
                after[query][document] = one["score"]
            show(start + len(block))
    own, intervals = scores.means([scores.of_query(before[query], folder.grades[query]) for query in folder.queries])
    more = {"pairs": len(pairs), "candidates": {"scores": own, "intervals": intervals}}
    return _ranked(folder, after, {"task": "rerank"}, more, output_dir)


def _candidates(path, folder, say):
    run = folders.read_run(path)
    if not run.keys() & folder.queries.keys():
        raise ValueError(f"{path}: none of its {len(run):,} queries is one of {folder.path} with a relevant document")
    known, unknown, found = set(folder.documents), 0, {}
    for query in folder.queries:
        ranking = run.get(query, [])
        found[query] = [document for document in ranking if document in known]
        unknown += len(ranking) - len(found[query])
    if unknown:
        say(f"{path}: {unknown:,} documents are not in the corpus: left out")
    if lacking := sum(not ranking for ranking in found.values()):
        say(f"{path}: {lacking:,} queries have no candidates: their scores are 0")
    return found


def _search(model, folder, keep_self, say):
    """({query: {document: score}}, facts) of the best documents of each query."""
    names = [*folder.queries]
    query_prompt = "query" if "query" in model.prompts else None
    document_prompt = next((name for name in DOCUMENT_PROMPTS if name in model.prompts), None)
    blocks = [_encoded(model, chunk, query_prompt) for chunk in chunks((folder.queries[name] for name in names), CHUNK)]
    queries = np.concatenate(blocks)
    check_finite(queries, lambda i: f"query {names[i]!r}")
    documents, ranks = folder.documents, np.empty(len(folder.documents), np.int64)
    ranks[sorted(range(len(documents)), key=documents.__getitem__)] = np.arange(len(documents))
    by_rank = np.empty(len(documents), np.int64)
    by_rank[ranks] = np.arange(len(documents))
    device = next(model.parameters()).device
    # one more: the query itself may be among them
    best = Best(torch.from_numpy(queries).to(device), scores.DEPTH + 1, model.similarity_fn_name)
    with progress(len(documents), 0) as show:
        for rows in chunks_of(folder.corpus()):
            found = _encoded(model, [text for _, _, text in rows], document_prompt)
            check_finite(found, lambda i: f"document {rows[i][1]!r}")  # noqa: B023
            block = torch.from_numpy(ranks[best.count : best.count + len(rows)])
            best.add(torch.from_numpy(found).to(device), block)
            show(best.count)
    values, places = best.found()
    rankings, dropped = {}, 0
    for name, row, row_places in zip(names, values.tolist(), places, strict=True):
        own = {documents[by_rank[place]]: value for place, value in zip(row_places, row, strict=True)}
        if not keep_self and name in own and name not in folder.grades[name]:
            del own[name]
            dropped += 1
        rankings[name] = dict([*own.items()][: scores.DEPTH])
    if dropped:
        say(f"{folder.path}: {dropped:,} queries found the document of their own id: left out, see --keep-self")
    return rankings, {
        "similarity": model.similarity_fn_name, "own_id_left_out": dropped,
        "prompts": {"query": query_prompt, "document": document_prompt},
    }  # fmt: skip


def _encoded(model, texts, prompt_name):
    return model.encode(texts, prompt_name=prompt_name, tokens_per_batch=TOKENS_PER_BATCH)


def _ranked(folder, rankings, first, more, output_dir):
    per_query = [scores.of_query(folders.ranked(found), folder.grades[name]) for name, found in rankings.items()]
    values, intervals = scores.means(per_query)
    metrics = first | {
        "metric": scores.MAIN, "queries": len(rankings), "documents": len(folder.documents), "scores": values,
        "intervals": intervals, **more, "remarks": folder.remarks,
    }  # fmt: skip
    if output_dir is not None:
        directory = _write(output_dir, metrics)
        files.write(directory / "run.trec", "".join(folders.run_lines(rankings, "fastbert")))
        rows = ({"id": name} | one for name, one in zip(rankings, per_query, strict=True))
        files.write(directory / "queries.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return metrics


def _write(directory, metrics):
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    results.write_metrics(directory, metrics)
    return directory


def _similarity(model, path, text_columns, label_column, say):
    spec = Spec("regress", columns=({"texts": list(text_columns)} if text_columns else {}))
    spec.columns |= {"label": label_column} if label_column else {}
    notes, gold = Notes(path), []
    for example in regress.read(path, spec, notes):
        if len(example.texts) != 2:
            raise ValueError(f"{path} has {spec.columns['texts']} as text: name the columns of both with --text-column")
        gold.append(example.gold)
    notes.check()
    if said := notes.said():
        say(said)
    if not gold:
        raise ValueError(f"{path} has no usable row")
    similarity, values = SIMILARITIES[model.similarity_fn_name], []
    for chunk in chunks(regress.read(path, spec, Notes(path)), CHUNK):
        vectors = _encoded(model, [text for example in chunk for text in example.texts], None)
        check_finite(vectors, lambda i: f"{path} line {chunk[i // 2].number}")  # noqa: B023
        pairs = torch.from_numpy(vectors).view(len(chunk), 2, 1, -1)
        values += [float(similarity(one, other)) for one, other in pairs]
    found, intervals = scores.correlations(gold, values)
    return {
        "task": "embed", "metric": "spearman", "pairs": len(gold), "scores": found, "intervals": intervals,
        "similarity": model.similarity_fn_name, "skipped_rows": len(notes.skipped),
    }  # fmt: skip
