"""`python -m fastdecode.train`: make the shipped models again, from the Python standard library's sources."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

try:
    from . import corpus, evaluate, prompts, recipes
except ModuleNotFoundError as error:
    raise SystemExit(f"fastdecode.train needs {error.name}: pip install 'fastdecode[cli,viz]'") from None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastdecode.train", description=__doc__)
    parser.add_argument(
        "what",
        nargs="*",
        choices=["tiny-code", "tiny-code-draft", "evaluate", "lists"],
        default=["tiny-code", "tiny-code-draft", "evaluate"],
        help="train one of the models, score tiny-code, or write the lists of files and prompts anew",
    )
    parser.add_argument("--out", type=Path, default=Path("build/train"), help="states, logs, plots, finished models")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="train for this long instead of the recipe's number of tokens")
    length.add_argument("--tokens", type=int, help="train on this many tokens instead of the recipe's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for what in args.what:
        if what == "lists":
            corpus.write_lists(corpus.stdlib_folder())
            prompts.write()
        elif what == "evaluate":
            evaluate.main(args.out / "tiny-code")
        else:
            changes = {"tokens": args.tokens, "minutes": args.minutes}
            recipe = replace(recipes.RECIPES[what], **{k: v for k, v in changes.items() if v is not None})
            recipes.TRAINERS[what](recipe, args.out)


if __name__ == "__main__":
    main()
