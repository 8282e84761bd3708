"""`python -m fastbert` and the command `fastbert`."""

from .interrupts import Interrupted, finish, install


def run():
    """Run the command line. A signal at any time, in the imports too, gives one line."""
    try:
        install()
        from .cli import main

        main(prog_name="fastbert")
    except Interrupted as error:
        finish(error.number)


if __name__ == "__main__":
    run()
