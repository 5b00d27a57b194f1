"""Commands: `python -m tdq_exp VERB ...`.

Each verb is a module of this package with a `main()`; `run` is `tdq_exp.run`. `VERB --help` lists
its options.
"""

from __future__ import annotations

import importlib
import sys

VERBS = {
    "run": ("tdq_exp.run", "compose an experiment and run it (also: python -m tdq_exp.run)"),
    "explain": ("tdq_exp.commands.explain", "explain the keys of a configuration"),
    "table": ("tdq_exp.commands.table", "run the cells of a table that have no row, and render it"),
    "figure": ("tdq_exp.commands.figure", "measure what a figure of the paper shows, and draw it"),
    "report": ("tdq_exp.commands.report", "write all results as one page, results/report.html"),
    "sample": ("tdq_exp.commands.sample", "draw images from a finished run or a packed network"),
    "pack": (
        "tdq_exp.commands.pack",
        "write a quantized run as one file, weights at their real bit width",
    ),
    "status": ("tdq_exp.commands.status", "say what is done, running, failed, stale or missing"),
    "render": ("tdq_exp.commands.render", "draw all tables, figures and claims of a scale again"),
    "claims": ("tdq_exp.commands.claims", "judge the paper's claims from the rows"),
    "measure": ("tdq_exp.commands.measure", "measure anybody's images as rows are measured"),
    "verify": ("tdq_exp.commands.verify", "check the checksums of a run, a folder or a table"),
    "export": ("tdq_exp.commands.export", "write a quantized run as an ONNX graph"),
}


def main() -> int:
    """Run the verb that the command line names.

    Returns:
        The exit code: 2 for an unknown verb.
    """
    arguments = sys.argv[1:]

    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m tdq_exp VERB ...\n")
        for verb, (_, summary) in VERBS.items():
            print(f"  {verb:8} {summary}")
        print("\nThe options of a verb: python -m tdq_exp VERB --help")
        return 0

    verb = arguments[0]
    if verb not in VERBS:
        print(f"error: {verb}: no such command; choose one of {', '.join(VERBS)}", file=sys.stderr)
        return 2

    sys.argv = [f"python -m tdq_exp {verb}", *arguments[1:]]
    command = importlib.import_module(VERBS[verb][0])
    return command.main() or 0
