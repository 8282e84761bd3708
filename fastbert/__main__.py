"""`python -m fastbert` is the command `fastbert`."""

from .cli import main

main(prog_name="fastbert")
