"""`python -m pman` is the `pman` command."""

from pman.cli import main

if __name__ == "__main__":
    main(prog_name="pman")
