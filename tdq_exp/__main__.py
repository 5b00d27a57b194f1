"""`python -m tdq_exp VERB`: one program for all commands."""

import sys

from tdq_exp.commands import main

if __name__ == "__main__":
    sys.exit(main())
