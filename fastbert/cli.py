"""The command line: arguments only, no logic. Each command imports what it needs when it runs, so that help is fast."""

import contextlib
import dataclasses
import importlib
import sys
import warnings
from pathlib import Path

import click

from . import __version__


class Failure(click.ClickException):
    """An error: one line on stderr and an exit code."""

    def __init__(self, exit_code, reason):
        super().__init__(f"fastbert: error: {' '.join(str(reason).split())}")
        self.exit_code = exit_code

    def show(self, file=None):
        click.echo(self.message, err=True)


@contextlib.contextmanager
def one_line_errors():
    """Exit code 2 for errors of the user and for too little memory, 1 for training that diverged, 130 for Ctrl-C."""
    try:
        yield
    except click.UsageError as error:
        raise Failure(2, error.format_message()) from None
    except ValueError as error:
        raise Failure(2, error) from None
    except OSError as error:
        # Python's own text begins with a number
        own = error.filename is not None and error.strerror
        raise Failure(2, f"{error.filename}: {error.strerror}" if own else error) from None
    except FloatingPointError as error:
        raise Failure(1, error) from None
    except KeyboardInterrupt:
        raise Failure(130, "interrupted") from None
    except (MemoryError, RuntimeError) as error:
        # PyTorch's is a RuntimeError
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        raise Failure(2, f"out of memory: {error}") from None


def spread(args, several):
    """Turn `--train-file a b` into click's `--train-file a --train-file b`, for the options named in `several`."""
    result, option, values = [], None, 0
    for arg in args:
        if arg.startswith("-"):
            name = arg.replace("_", "-")
            option, values = (name if name in several else None), 0
        elif option and (values := values + 1) > 1:
            result.append(option)
        result.append(arg)
    return result


class Command(click.Command):
    """A command that takes several values after one option."""

    def parse_args(self, ctx, args):
        several = {name for param in self.get_params(ctx) if param.multiple for name in param.opts}
        return super().parse_args(ctx, spread(args, several))


class Main(click.Group):
    """The whole command line: whatever goes wrong in a command is one line."""

    def make_context(self, *args, **kwargs):
        with one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx):
        warnings.showwarning = lambda message, *_, **__: click.echo(f"fastbert: warning: {message}", err=True)
        with one_line_errors():
            return super().invoke(ctx)


class ScriptCommand(Command):
    """A command that runs the training script of its name. Its options are the fields of the script's dataclass.

    They are read when needed. The option --config names a file with values for the others; the command line wins.
    """

    @property
    def script(self):
        """(function, dataclass of its options)."""
        module = importlib.import_module(f".training.{self.name}", __package__)
        return getattr(module, self.name), getattr(module, f"{self.name.capitalize()}Config")

    def get_params(self, ctx):
        if not self.params:
            help = "YAML or JSON file of options; the command line wins."
            self.params.append(click.Option(["--config", "config_file"], metavar="FILE", help=help))
            self.params += [_option(field) for field in dataclasses.fields(self.script[1])]
        return super().get_params(ctx)

    def parse_args(self, ctx, args):
        from .training.options import read_file

        rest = super().parse_args(ctx, args)
        if file := ctx.params.pop("config_file"):
            try:
                stored = self.make_context(self.name, read_file(file, self.script[1])).params
            except click.UsageError as error:
                raise ValueError(f"--config {file}: {error.format_message()}") from None
            except (ValueError, OSError) as error:
                raise ValueError(f"--config {file}: {error}") from None
            ctx.params = stored | {name: value for name, value in ctx.params.items() if value not in (None, ())}
        return rest

    def invoke(self, ctx):
        run, config = self.script
        result = run(config(**{name: value for name, value in ctx.params.items() if value not in (None, ())}))
        if result["signal"]:
            sys.exit(128 + result["signal"])


def _option(field):
    from .training.options import flag, kind

    choices, default = field.metadata["choices"], field.default
    spelling, settings = flag(field.name), {"type": click.Choice(choices) if choices else kind(field)}
    if kind(field) is bool:
        spelling, settings = f"{spelling}/--no-{spelling[2:]}", {}
    # the default is shown but not set: it must not override a --config file
    shown = "" if default in ((), "", None, False) else f"  [default: {default}]"
    return click.Option(
        [spelling], default=None, multiple=default == (), help=field.metadata["help"] + shown, **settings
    )  # fmt: skip


_revision = click.option("--revision", help="Branch, tag or commit of a model on the hub.  [default: its main branch]")


_dtype = click.option(
    "--dtype", type=click.Choice(["fp32", "auto", "bf16", "int8"]), default="fp32", show_default=True,
    help="What a CPU multiplies in; auto: bf16 where that is faster. bf16 and int8 give fp32 where not faster.",
)  # fmt: skip


# --max_steps and --max-steps are the same
@click.group(
    cls=Main, context_settings={"token_normalize_func": lambda name: name.replace("_", "-"), "max_content_width": 120}
)
@click.version_option(__version__, message="fastbert %(version)s")
def main():
    """Train and run BERT-family encoders on fused Triton kernels.

    Pretrain a model from raw text, fine-tune one on a task and predict with it, embed texts, convert a checkpoint, fill
    in masked words, inspect the kernels, benchmark them. To speed up a model that you already have, call
    fastbert.swap(model) from Python.
    """


@main.command(cls=ScriptCommand)
def pretrain():
    """Pretrain a model on raw text.

    Writes the tokenizer, the token shards, a model that transformers can load, its learning curve and a model card to
    --output-dir. Ctrl-C saves a checkpoint, and --resume continues from it.
    """


@main.command(cls=ScriptCommand)
def finetune():
    """Fine-tune a model on a table of labelled examples.

    Writes a model that transformers can load, its scores, its predictions on held-out examples, its mistakes and a
    model card to --output-dir. Ctrl-C saves a checkpoint, and --resume continues from it.
    """


@main.command(cls=Command)
@click.option("--model", required=True, help="A fine-tuned model, ours or of transformers: a directory, or a name on "
              "the HuggingFace hub.")  # fmt: skip
@_revision
@click.option("--input", "path", metavar="FILE", help="Table with the columns that the model was trained on.")
@click.option("--output", metavar="FILE", help="For the predictions: a .jsonl file, a line for each row, or a "
              ".parquet, a directory with part files.")  # fmt: skip
@click.option("--text", "texts", multiple=True, help="Print the prediction for one text. A pair, a question and its "
              "context, or a context and its choices: one --text for each, in order.")  # fmt: skip
@click.option("--text-column", "columns", multiple=True, help="Column of the text, or both of a pair.")
@click.option("--calibrated", is_flag=True, help="Divide the logits by the temperature found in training.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
@_dtype
def predict(model, revision, path, output, texts, columns, calibrated, device, dtype):
    """Predict with a fine-tuned model.

    For each row of --input, a row in --output; or, for one --text, JSON on the screen. What was interrupted goes on.
    """
    import json

    from .tasks.predictor import load
    from .training.processes import device_of

    if bool(texts) == bool(path) or bool(path) != bool(output):
        raise ValueError("expected either --text, or --input and --output")
    predictor = load(model, revision=revision, device=str(device_of(device)), text_columns=columns, dtype=dtype)
    if texts:
        item = texts[0] if len(texts) == 1 else texts
        (found,) = predictor.predict([item], calibrated=calibrated)
        click.echo(json.dumps(found, ensure_ascii=False))
    else:
        say = lambda line: click.echo(line, err=True)  # noqa: E731
        count = predictor.predict_file(path, output, calibrated=calibrated, say=say)
        click.echo(f"{output}: {count:,} predictions")


@main.command(cls=Command)
@click.option("--model", required=True, help="A fine-tuned model, ours or of transformers: a directory, or a name on "
              "the HuggingFace hub.")  # fmt: skip
@_revision
@click.option("--input", "paths", multiple=True, required=True, metavar="FILE", help="Labelled examples; for "
              "retrieval a folder of BEIR, or a table of two texts and a score.")  # fmt: skip
@click.option("--task", type=click.Choice(["auto", "embed", "rerank"]), default="auto", show_default=True,
              help="embed: search with the model's vectors; rerank: order --candidates.")  # fmt: skip
@click.option("--output-dir", metavar="DIR", help="Directory for metrics.json, predictions, mistakes and pictures.")
@click.option("--text-column", "columns", multiple=True, help="Column of the text, or both of a pair.")
@click.option("--label-column", help="Column of the label, labels or score.")
@click.option("--calibrated", is_flag=True, help="Divide the logits by the temperature found in training.")
@click.option("--candidates", metavar="FILE|DIR", help="To rerank: a run of TREC, or a model that finds 100 documents "
              "a query.")  # fmt: skip
@click.option("--keep-self", is_flag=True, help="Do not leave out a document with the id of the query, as BEIR does.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
@_dtype
def evaluate(
    model, revision, paths, task, output_dir, columns, label_column, calibrated, candidates, keep_self, device, dtype
):
    """Print the scores of a model, as JSON.

    Of a fine-tuned model on labelled examples; of an embedder or a cross-encoder on queries, documents and judgements.
    With --output-dir, also predictions, or the documents found.
    """
    import json

    from .retrieval import evaluation
    from .tasks.predictor import load
    from .training.processes import device_of

    loading = dict(revision=revision, device=str(device_of(device)), dtype=dtype)
    columns = dict(text_columns=columns, label_column=label_column)
    how = dict(output_dir=output_dir, say=lambda line: click.echo(line, err=True))
    if task == "auto":
        task = evaluation.task_of(model, paths, revision)
    if task is None:
        found = load(model, **loading, **columns).evaluate(paths, calibrated=calibrated, **how)
    else:
        found = evaluation.evaluate(task, model, paths, candidates, loading, columns, keep_self, **how)
    click.echo(json.dumps(found, indent=2, ensure_ascii=False))


@main.command(cls=Command)
@click.option("--model", required=True, help="A model for embeddings: a directory of sentence-transformers or ours, or "
              "a name on the HuggingFace hub.")  # fmt: skip
@_revision
@click.option("--input", "path", required=True, metavar="FILE", help="Texts: .txt, one a line, or .jsonl, .csv, .tsv, "
              ".parquet.")  # fmt: skip
@click.option("--output", required=True, metavar="DIR", help="Directory for .npy parts, or NAME.parquet for part files "
              "with id and vector.")  # fmt: skip
@click.option("--text-column", "columns", multiple=True, help="Column of the text; several are joined by a blank.")
@click.option("--prompt", metavar="NAME", help="One of the model's prompts, such as query.")
@click.option("--precision", type=click.Choice(["float32", "float16", "int8", "ubinary"]), default="float32",
              show_default=True, help="What is stored. ubinary: a bit for each number.")  # fmt: skip
@click.option("--ranges", metavar="FILE", help="ranges.npy of other int8 vectors, to compare these with them.")
@click.option("--normalize", is_flag=True, help="Divide each vector by its L2 norm.")
@click.option("--truncate-dim", type=click.IntRange(1), help="Keep the first so many columns.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
@_dtype
def embed(model, revision, path, output, columns, prompt, precision, ranges, normalize, truncate_dim, device, dtype):
    """Write a vector for each text of a file.

    In the order of the file, chunk by chunk. What was interrupted goes on.
    """
    import time

    from .retrieval.embedding import embed_file, load_embedder
    from .training.processes import device_of

    options = dict(revision=revision, device=str(device_of(device)), dtype=dtype, truncate_dim=truncate_dim)
    embedder, start = load_embedder(model, **options), time.perf_counter()
    found = embed_file(
        embedder, path, output, text_columns=columns, prompt_name=prompt, precision=precision, ranges=ranges,
        normalize=normalize, say=lambda line: click.echo(line, err=True),
    )  # fmt: skip
    about = f"{found['count']:,} vectors of {found['width']:,} numbers, {precision}"
    click.echo(f"{output}: {about}, {time.perf_counter() - start:,.0f} s")


@main.group()
def tokenizer():
    """Train a tokenizer."""


@tokenizer.command(cls=Command)
@click.option("--train-file", "files", multiple=True, required=True, help="Text files, folders or globs to read.")
@click.option("--output-dir", required=True, help="Directory for the tokenizer.")
@click.option(
    "--vocab-size", type=click.IntRange(1, 2**31 - 1), default=30522, show_default=True, help="Vocabulary size."
)
@click.option("--cased", is_flag=True, help="Keep case and accents. Byte-level BPE always keeps them.")
@click.option("--kind", type=click.Choice(["wordpiece", "bpe"]), default="wordpiece", show_default=True,
              help="WordPiece, as in BERT, or byte-level BPE, as in RoBERTa.")  # fmt: skip
@click.option("--text-column", default="text", show_default=True, help="Column of .jsonl, .csv and .parquet files.")
@click.option("--layout", default="auto", show_default=True, help="Documents in .txt files: auto, blank-line or line.")
def train(files, output_dir, vocab_size, cased, kind, text_column, layout):
    """Train a tokenizer on text files."""
    from .data.tokenizer import save_tokenizer, train_bpe, train_wordpiece
    from .files import unused

    reading = dict(text_column=text_column, layout=layout)
    with unused(output_dir):
        if kind == "bpe":
            made = train_bpe(files, vocab_size, **reading)
        else:
            made = train_wordpiece(files, vocab_size, lowercase=not cased, **reading)
        save_tokenizer(made, output_dir)
    click.echo(f"{output_dir}: a tokenizer of {made.get_vocab_size():,} pieces")


@main.command(cls=Command)
@click.option("--train-file", "files", multiple=True, required=True, help="Text files, folders or globs to read.")
@click.option("--tokenizer", required=True, help="Directory of the tokenizer.")
@click.option("--output-dir", required=True, help="Directory for the shards.")
@click.option("--text-column", default="text", show_default=True, help="Column of .jsonl, .csv and .parquet files.")
@click.option("--layout", default="auto", show_default=True, help="Documents in .txt files: auto, blank-line or line.")
@click.option("--num-workers", type=click.IntRange(1, 1024), help="Number of threads.  [default: one per core]")
@click.option("--verify/--no-verify", default=True, help="Compare finished shards with their sha256.")
def prepare(files, tokenizer, output_dir, text_column, layout, num_workers, verify):
    """Tokenize text into shards that pretrain --train-file reads.

    Run again, it continues what was interrupted, and makes shards that are damaged or missing again.
    """
    from .data import shards
    from .data.tokenizer import load_tokenizer
    from .files import unused

    # not in a folder of a live run
    with unused(Path(output_dir).absolute().parent):
        pass
    manifest = shards.prepare(
        files, load_tokenizer(tokenizer), output_dir,
        text_column=text_column, layout=layout, num_workers=num_workers, verify=verify,
    )  # fmt: skip
    click.echo(
        f"{output_dir}: {manifest['tokens']:,} tokens in {manifest['documents']:,} documents, "
        f"{manifest['skipped_lines']:,} lines skipped"
    )


@main.command(cls=Command)
@click.option("--model", required=True, help="Directory of the model, or its name on the HuggingFace hub.")
@_revision
@click.option("--top-k", default=5, show_default=True, help="Number of words to print for each [MASK].")
@_dtype
@click.argument("text")
def fill_mask(model, revision, top_k, dtype, text):
    """Print the most likely words for each [MASK] in TEXT."""
    from .tasks import fill_mask as script

    for number, words in enumerate(script.fill_mask(*script.load_masked_lm(model, revision, dtype), text, top_k), 1):
        click.echo(f"[MASK] {number}")
        for word, probability in words:
            click.echo(f"  {probability:6.1%}  {word}")


@main.command(cls=Command)
@click.option("--allow-pickle", is_flag=True, help="Also read pytorch_model.bin: tensors only, no code is run.")
@_revision
@click.argument("source")
@click.argument("destination")
def convert(source, destination, allow_pickle, revision):
    """Convert a checkpoint to transformers' current format.

    Reads the model SOURCE, a directory or a name on the HuggingFace hub, and writes the directory DESTINATION.
    """
    from .model.convert import convert as rewrite

    model = rewrite(source, destination, allow_pickle=allow_pickle, revision=revision)
    count = sum(x.numel() for x in model.parameters())
    kind = f"{type(model).__name__} of model type {model.config.model_type}"
    click.echo(f"{destination}: a {kind}, {count / 1e6:.2f} M parameters")


@main.command(cls=Command)
@click.option("--compile", "compiles", is_flag=True, help="Compile the kernels. No GPU is needed.")
@click.option(
    "--arch", "archs", multiple=True, help="Any of sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 gfx942.  [default: sm_80]"
)
@click.option("--dtype", "dtypes", multiple=True, help="Any of bf16 fp16 fp32.  [default: bf16 fp32]")
@click.option(
    "--model", "models", multiple=True,
    help="Any of bert-base bert-large minilm deberta-base mpnet-base.  [default: all]",
)  # fmt: skip
@click.option("--op", "ops", multiple=True, help="Ops to compile: functions of fastbert.ops.  [default: all]")
@click.option("--candidates", is_flag=True, help="Also compile the launch settings that autotuning would try.")
@click.option("--json", "json_file", metavar="FILE", help="Also write the report as JSON.")
def doctor(compiles, archs, dtypes, models, ops, candidates, json_file):
    """Show versions, the device and how each op runs.

    With --compile, report the registers, spills, shared memory, occupancy and instructions of every kernel compiled for
    --arch. The exit code is 1 if a kernel spills, uses atomics, overflows an offset or misses the tensor cores.
    """
    from .proof import doctor as script

    if compiles:
        well = script.doctor_compile(archs, dtypes, models, ops, candidates=candidates, json_file=json_file)
        sys.exit(0 if well else 1)
    if archs or dtypes or models or ops or candidates or json_file:
        raise ValueError("--arch, --dtype, --model, --op, --candidates and --json go with --compile")
    for line in script.doctor():
        click.echo(line)


def _benchmark_suite():
    """The module benchmarks/suite.py of the checkout that holds this package."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    if not (folder / "suite.py").is_file():
        raise ValueError("bench needs a checkout of the repository: the folder benchmarks/ is not installed")
    sys.path.insert(0, str(folder))
    import suite

    return suite


@main.command(cls=Command)
@click.option("--ops", multiple=True, metavar="NAME", help="Ops to measure: functions of fastbert.ops, or all.")
@click.option("--models", multiple=True, metavar="NAME", help="Models to measure, such as bert-base, or all.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--quick", is_flag=True, help="Fewer shapes and rounds; the ops take under a minute.")
@click.option("--compare", metavar="FILE|DIR", help="Compare with older results. The exit code is 1 if a "
              "ratio fell by more than its spread.")  # fmt: skip
@click.option("--output", metavar="DIR", help="Directory for the results.  [default: benchmarks/results/<device>; "
              "runs/bench with --quick, --ops or --models]")  # fmt: skip
def bench(**options):
    """Benchmark fastbert against other installed libraries.

    Measures every op, model, training run and the data path, or only what --ops and --models name. Needs a checkout of
    the repository. benchmarks/README.md says what is measured and how.
    """
    sys.exit(_benchmark_suite().run(**options))


if __name__ == "__main__":
    # without this, `python -m fastbert.cli` does nothing and exits with 0
    import runpy

    runpy.run_module("fastbert", run_name="__main__")
