"""`python -m fastbert` runs the command `fastbert`."""

from .cli import main

main(prog_name="fastbert")
