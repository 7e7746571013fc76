"""`python -m fastdecode.train`: make the shipped models again, from the Python standard library's sources."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from . import recipes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastdecode.train", description=__doc__)
    parser.add_argument("what", choices=["tiny-code", "tiny-code-draft", "lists"], nargs="*", default=["tiny-code", "tiny-code-draft"])
    parser.add_argument("--out", type=Path, default=Path("build/train"), help="folder of states, logs, plots and finished models")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="train for this long instead of the recipe's number of tokens")
    length.add_argument("--tokens", type=int, help="train on this many tokens instead of the recipe's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for what in args.what:
        if what == "lists":
            recipes.corpus.write_lists(recipes.corpus.stdlib_folder())
            continue
        recipe = recipes.RECIPES[what]
        if args.tokens:
            recipe = replace(recipe, tokens=args.tokens)
        if args.minutes:
            recipe = replace(recipe, minutes=args.minutes)
        recipes.TRAINERS[what](recipe, args.out)


if __name__ == "__main__":
    main()
