"""Explain the keys of a configuration: what each means, its value, and what it may be.

python -m tdq_exp explain fit                                     all keys of a group
python -m tdq_exp explain fit.lr_step_size sampler.steps          some keys
python -m tdq_exp explain tdq plan +experiment=ddim_w4a4_lsq_tdq  as another run has them
python -m tdq_exp explain                                         every key
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from tdq_exp.commands import cli
from tdq_exp.config import schema
from tdq_exp.config.compose import compose
from tdq_exp.experiment.explained import Key, keys_of
from tdq_exp.runtime.progress import print_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    parser = cli.parser(__doc__, "python -m tdq_exp explain")
    parser.add_argument(
        "words", nargs="*", help="groups or keys (default: all), and overrides as of a run"
    )
    return cli.exit_code(show, parser.parse_args(arguments).words)


def show(words: Sequence[str]) -> None:
    """Print the keys that are asked for, with their values in a run of the overrides.

    Args:
        words: groups and keys, none for all; and overrides, which hold = or begin with ~.

    Raises:
        ValueError: for an override that can't be composed, or a key that there is not.
    """
    overrides = [word for word in words if "=" in word or word.startswith("~")]
    cfg = compose(overrides)
    schema.typed(cfg)  # refuses what a run would refuse
    keys = keys_of(schema.plain(cfg))

    asked = [word for word in words if word not in overrides]
    for word in asked:
        if not any(_is_part(key, word) for key in keys):
            known = dict.fromkeys(part for key in keys for part in (key.name, _group(key)))
            near = difflib.get_close_matches(word, known, 3, cutoff=0.0)
            raise ValueError(f"{word}: no such key; the nearest: {', '.join(near)}")

    wanted = [key for key in keys if not asked or any(_is_part(key, word) for word in asked)]
    print_table(
        "keys",
        ["key", "value", "may be", "meaning"],
        [[key.name, key.value, key.limits, key.meaning] for key in wanted],
    )


def _is_part(key: Key, word: str) -> bool:
    return key.name == word or key.name.startswith(f"{word}.")


def _group(key: Key) -> str:
    return key.name.partition(".")[0]
