"""The command line: arguments only, no logic. Each command imports what it needs when it runs, so that help is fast."""

import contextlib
import dataclasses
import sys
import warnings
from pathlib import Path

import click

from . import __version__


class Failure(click.ClickException):
    """One line on stderr and an exit code."""

    def __init__(self, exit_code, reason):
        super().__init__(f"fastbert: error: {' '.join(str(reason).split())}")
        self.exit_code = exit_code

    def show(self, file=None):
        click.echo(self.message, err=True)


@contextlib.contextmanager
def one_line_errors():
    """Exit code 2 for what the user can put right, 1 for training that diverged, 130 for Ctrl-C; never a traceback."""
    try:
        yield
    except click.UsageError as error:
        raise Failure(2, error.format_message()) from None
    except (ValueError, OSError) as error:
        raise Failure(2, error) from None
    except FloatingPointError as error:
        raise Failure(1, error) from None
    except KeyboardInterrupt:
        raise Failure(130, "interrupted") from None


def spread(args, several):
    """`--train-file a b` as click reads it, `--train-file a --train-file b`, for the options named in `several`."""
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
    def parse_args(self, ctx, args):
        several = {name for param in self.get_params(ctx) if param.multiple for name in param.opts}
        with one_line_errors():
            return super().parse_args(ctx, spread(args, several))

    def invoke(self, ctx):
        warnings.showwarning = lambda message, *_, **__: click.echo(f"fastbert: warning: {message}", err=True)
        with one_line_errors():
            return super().invoke(ctx)


class Group(click.Group):
    def resolve_command(self, ctx, args):
        with one_line_errors():
            return super().resolve_command(ctx, args)


class ScriptCommand(Command):
    """A command whose options are the fields of a script's dataclass, read when they are needed."""

    def __init__(self, *args, options, **kwargs):
        super().__init__(*args, **kwargs)
        self.options = options

    def get_params(self, ctx):
        if len(self.params) == 1:
            self.params += [_option(field) for field in dataclasses.fields(self.options())]
        return super().get_params(ctx)


def _option(field):
    from .training.options import flag, kind

    choices, default = field.metadata["choices"], field.default
    spelling, settings = flag(field.name), {"type": click.Choice(choices) if choices else kind(field)}
    if kind(field) is bool:
        spelling, settings = f"{spelling}/--no-{spelling[2:]}", {}
    # the default is shown and not set: what stands in a --config file must not be hidden by it
    shown = "" if default in ((), "", None, False) else f"  [default: {default}]"
    return click.Option(
        [spelling], default=None, multiple=default == (), help=field.metadata["help"] + shown, **settings
    )  # fmt: skip


def _pretrain_config():
    from .training.pretrain import PretrainConfig

    return PretrainConfig


# --max_steps and --max-steps are the same
@click.group(
    cls=Group, context_settings={"token_normalize_func": lambda name: name.replace("_", "-"), "max_content_width": 120}
)
@click.version_option(__version__, message="fastbert %(version)s")
def main():
    """Pretrain BERT, and use it, through fused kernels."""


@main.command(cls=ScriptCommand, options=_pretrain_config)
@click.option("--config", "config_file", metavar="FILE", help="Options from a YAML or JSON file; those given here win.")
def pretrain(config_file, **options):
    """Pretrain BERT on text."""
    from .training import pretrain as script
    from .training.options import read_file

    given = {name: value for name, value in options.items() if value not in (None, ())}
    stored = read_file(config_file, script.PretrainConfig) if config_file else {}
    result = script.pretrain(script.PretrainConfig(**stored | given))
    if result["signal"]:
        sys.exit(128 + result["signal"])


@main.group(cls=Group)
def tokenizer():
    """Make tokenizers."""


@tokenizer.command(cls=Command)
@click.option("--train-file", "files", multiple=True, required=True, help="Text files, folders or globs.")
@click.option("--output-dir", required=True, help="Where the tokenizer's files go.")
@click.option("--vocab-size", default=30522, show_default=True, help="Pieces.")
@click.option("--cased", is_flag=True, help="Keep case and accents (WordPiece; byte-level BPE always does).")
@click.option("--kind", type=click.Choice(["wordpiece", "bpe"]), default="wordpiece", show_default=True,
              help="WordPiece as BERT has it, or byte-level BPE as RoBERTa has it.")  # fmt: skip
@click.option("--text-column", default="text", show_default=True, help="Column with the text, in tables.")
@click.option("--layout", default="auto", show_default=True, help="Documents of .txt files: auto, blank-line or line.")
def train(files, output_dir, vocab_size, cased, kind, text_column, layout):
    """Train a tokenizer on text."""
    from .tokenizer import save_tokenizer, train_bpe, train_wordpiece

    reading = dict(text_column=text_column, layout=layout)
    if kind == "bpe":
        made = train_bpe(files, vocab_size, **reading)
    else:
        made = train_wordpiece(files, vocab_size, lowercase=not cased, **reading)
    save_tokenizer(made, output_dir)
    click.echo(f"{output_dir}: a tokenizer of {made.get_vocab_size():,} pieces")


@main.command(cls=Command)
@click.option("--train-file", "files", multiple=True, required=True, help="Text files, folders or globs.")
@click.option("--tokenizer", required=True, help="Directory with a tokenizer.")
@click.option("--output-dir", required=True, help="Where the shards go.")
@click.option("--text-column", default="text", show_default=True, help="Column with the text, in tables.")
@click.option("--layout", default="auto", show_default=True, help="Documents of .txt files: auto, blank-line or line.")
@click.option("--num-workers", type=int, help="Threads; by default one per core.")
def prepare(files, tokenizer, output_dir, text_column, layout, num_workers):
    """Turn text into token shards, for pretrain --train-file."""
    from . import shards
    from .tokenizer import load_tokenizer

    manifest = shards.prepare(
        files, load_tokenizer(tokenizer), output_dir,
        text_column=text_column, layout=layout, num_workers=num_workers,
    )  # fmt: skip
    click.echo(
        f"{output_dir}: {manifest['tokens']:,} tokens in {manifest['documents']:,} documents, "
        f"{manifest['skipped_lines']:,} lines skipped"
    )


@main.command(cls=Command)
@click.option("--model", required=True, help="Directory of a model.")
@click.option("--top-k", default=5, show_default=True, help="Words for each [MASK].")
@click.argument("text")
def fill_mask(model, top_k, text):
    """Print the most probable words for each [MASK] in TEXT."""
    from . import fill_mask as script

    for number, words in enumerate(script.fill_mask(*script.load(model), text, top_k), 1):
        click.echo(f"[MASK] {number}")
        for word, probability in words:
            click.echo(f"  {probability:6.1%}  {word}")


@main.command(cls=Command)
@click.option("--allow-pickle", is_flag=True, help="Read pytorch_model.bin: its tensors only, no code in it is run.")
@click.argument("source")
@click.argument("destination")
def convert(source, destination, allow_pickle):
    """Rewrite the model directory SOURCE as DESTINATION, in the form that transformers stores today."""
    from .convert import convert as rewrite

    model = rewrite(source, destination, allow_pickle=allow_pickle)
    count = sum(x.numel() for x in model.parameters())
    kind = f"{type(model).__name__} of model type {model.config.model_type}"
    click.echo(f"{destination}: a {kind}, {count / 1e6:.2f} M parameters")


@main.command(cls=Command)
@click.option("--compile", "compiles", is_flag=True, help="Compile the kernels, for GPUs that need not be here.")
@click.option("--arch", "archs", multiple=True, help="sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 gfx942.  [default: sm_80]")
@click.option("--dtype", "dtypes", multiple=True, help="bf16 fp16 fp32.  [default: bf16 fp32]")
@click.option("--model", "models", multiple=True, help="bert-base bert-large minilm deberta-base.  [default: all]")
@click.option("--op", "ops", multiple=True, help="Functions of fastbert.ops.  [default: all]")
@click.option("--candidates", is_flag=True, help="Also the settings that a search would try.")
@click.option("--json", "json_file", metavar="FILE", help="Where the figures go, beside the screen.")
def doctor(compiles, archs, dtypes, models, ops, candidates, json_file):
    """Print versions, the device, and which implementation the ops use here.

    With --compile: registers, spills, shared memory, occupancy and instructions of every kernel, as the compiler made
    it for --arch. Exit code 1 if one spills, uses atomics, overflows an offset or misses the tensor cores.
    """
    from . import doctor as script

    if compiles:
        well = script.doctor_compile(archs, dtypes, models, ops, candidates=candidates, json_file=json_file)
        sys.exit(0 if well else 1)
    if archs or dtypes or models or ops or candidates or json_file:
        raise ValueError("--arch, --dtype, --model, --op, --candidates and --json go with --compile")
    for line in script.doctor():
        click.echo(line)


def _benchmark_suite():
    """benchmarks/suite.py of the checkout that this package stands in."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    if not (folder / "suite.py").is_file():
        raise ValueError("bench runs from a checkout of the repository: its folder benchmarks/ is not installed")
    sys.path.insert(0, str(folder))
    import suite

    return suite


@main.command(cls=Command)
@click.option("--ops", multiple=True, metavar="NAME", help="Functions of fastbert.ops, or all.")
@click.option("--models", multiple=True, metavar="NAME", help="Models, such as bert-base, or all.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--quick", is_flag=True, help="Few shapes and rounds: under a minute for the ops.")
@click.option("--compare", metavar="FILE|DIR", help="Older results: exit code 1 if a ratio fell by more than its "
              "spread.")  # fmt: skip
@click.option("--output", metavar="DIR", help="Where results go.  [default: benchmarks/results/<device>; for a part, "
              "or with --quick, runs/bench]")  # fmt: skip
def bench(**options):
    """Measure fastbert side by side with whatever else is installed.

    Every op, model, training run and the data path, or what --ops and --models name. Needs a checkout of the
    repository; benchmarks/README.md says what is measured and how.
    """
    sys.exit(_benchmark_suite().run(**options))


if __name__ == "__main__":
    main(prog_name="fastbert")
