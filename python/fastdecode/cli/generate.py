"""Generate a continuation of a prompt, or of several as one batch."""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

from ..compare import tune_method
from ..generation import generate, stream
from ..methods import RULES, Method, find_method
from ..runtime import pin_threads, thread_settings
from ..types import Result, Results, Statistics
from .common import (
    UserError,
    add_model_arguments,
    model_folder,
    need,
    print_json,
    read_model,
    read_text,
    read_tokenizer,
)

PROMPT = "def quicksort(items):"
# what text from a model must not do to a terminal: control characters other than newline and tab
_CONTROL = {code: "\ufffd" for code in (*range(9), *range(11, 32), *range(127, 160))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt", nargs="*", help=f"text, - for stdin; several are decoded as one batch; default: {PROMPT!r}"
    )
    parser.add_argument("--prompt-file", action="append", default=[], metavar="FILE", help="a prompt; may be repeated")
    parser.add_argument(
        "--method",
        metavar="NAME",
        help="see `fastdecode methods`; default: speculative where there is a draft model (the shipped model has one), "
        "else prompt-lookup",
    )
    parser.add_argument("--rule", choices=tuple(RULES), help="how drafts are accepted; see `fastdecode methods`")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help="a parameter of the method or the rule, such as confidence=0.5; may be repeated",
    )
    add_model_arguments(parser)
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--min-p", type=float, metavar="P")
    parser.add_argument("--typical-p", type=float, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="on what the text holds")
    parser.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="per time in the output")
    parser.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help="on what the output holds")
    parser.add_argument("--seed", type=int, metavar="N", help="default 0")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="ends the text before it; may be repeated")
    parser.add_argument("--stop-id", action="append", type=int, metavar="ID", help="ends the text; may be repeated")
    parser.add_argument("--min-new-tokens", type=int, default=0, metavar="N", help="no end before so many tokens")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the model's end of text")
    parser.add_argument("--logprobs", type=int, metavar="N", help="with --json: log-probabilities, and the N likeliest")


def run(arguments: argparse.Namespace) -> int:
    if arguments.logprobs is not None and not arguments.json:
        raise UserError("--logprobs: needs --json, which prints them")
    if not arguments.json:
        need("rich")
    prompts = _prompts(arguments)
    method = find_method(arguments.method or _default_method(arguments))
    if arguments.draft_model is not None and not method.needs_draft_model:
        raise UserError(f"--draft-model: method {method.name!r} uses none")
    folder = model_folder(arguments.model)
    draft_folder = None
    if method.needs_draft_model:
        if arguments.model is not None and arguments.draft_model is None:
            raise UserError(f"--draft-model: method {method.name!r} needs one beside --model")
        draft_folder = model_folder(arguments.draft_model, "tiny-code-draft")
    model = read_model(folder, arguments.dtype)
    draft = read_model(draft_folder, arguments.dtype) if draft_folder else None
    options: dict[str, Any] = {
        "method": method.name,
        "draft_model": draft,
        "tokenizer": read_tokenizer(folder),
        "stop_ids": arguments.stop_id,
    }
    for name in ("rule", "draft_length", "max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p"):
        options[name] = getattr(arguments, name)
    for name, value in arguments.set:
        if name not in {*method.parameters, *(RULES[arguments.rule].parameters if arguments.rule else ())}:
            raise UserError(f"--set: expected a parameter of the method or the rule, got {name!r}")
        options[name] = value
    for name in ("typical_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
        options[name] = getattr(arguments, name)
    for name in ("seed", "stop", "ignore_eos", "logprobs", "kv_cache"):
        options[name] = getattr(arguments, name)
    stream(model, prompts, **options)  # checks the arguments before anything is measured
    with thread_settings() as cpus:
        if arguments.threads is not None:
            threads = pin_threads(arguments.threads, cpus=cpus)
        else:
            threads = tune_method(method, model, draft, arguments.draft_length, cpus)
        if len(prompts) == 1 and not arguments.json:
            result = _show_stream(model, prompts[0], options)
            results = Results((result,), result.statistics)
        else:
            several = generate(model, prompts, **options)
            assert isinstance(several, Results)
            results = several
    about = {
        "method": method.name,
        "rule": arguments.rule or next(iter(method.rules), None),
        "guarantee": method.guarantee(arguments.rule, sampled=arguments.temperature > 0),
        "dtype": arguments.dtype,
        "kv_cache": arguments.kv_cache,
        "threads": threads,
    }
    if arguments.json:
        found = [_result(prompt, result) for prompt, result in zip(prompts, results)]
        print_json({**about, "results": found, "statistics": _statistics(results.statistics)})
    else:
        if len(prompts) > 1:
            _show_several(prompts, results)
        _show_statistics(method, about, results)
    return 1 if any(result.finish_reason == "error" for result in results) else 0


def _setting(text: str) -> tuple[str, int | float]:
    """NAME=VALUE as a name and a number."""
    name, found, value = text.partition("=")
    try:
        number: int | float = int(value)
    except ValueError:
        try:
            number = float(value)
        except ValueError:
            found = ""
    if not found or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE with a number, got {text!r}")
    return name, number


def _default_method(arguments: argparse.Namespace) -> str:
    has_draft = arguments.model is None or arguments.draft_model is not None
    return "speculative" if has_draft else "prompt-lookup"


def _prompts(arguments: argparse.Namespace) -> list[str]:
    given = [*arguments.prompt, *arguments.prompt_file]
    if given.count("-") > 1:
        raise UserError("prompt: stdin (-) can be read only once")
    prompts = [sys.stdin.read() if text == "-" else text for text in arguments.prompt]
    prompts += [read_text(path) for path in arguments.prompt_file]
    return prompts or [PROMPT]


# --- as text ----------------------------------------------------------------------------------------------------------


def _write(text: str) -> None:
    sys.stdout.write(text.translate(_CONTROL) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _show_stream(model: Any, prompt: str, options: dict[str, Any]) -> Result:
    """Write the text to stdout as it comes: after the prompt on a terminal, alone into a pipe."""
    chunks = stream(model, prompt, **options)
    if sys.stdout.isatty():
        _write(prompt)
    try:
        for chunk in chunks:
            _write(chunk.text or "")
            if chunk.result is not None:
                return chunk.result
    finally:
        _write("\n")
    raise AssertionError("the last chunk of a request carries its result")


def _show_several(prompts: list[str], results: Results) -> None:
    for index, (prompt, result) in enumerate(zip(prompts, results)):
        _write(f"--- {index + 1}: {result.finish_reason}, {len(result.tokens)} tokens\n{prompt}{result.text}\n")


def _show_statistics(method: Method, about: dict[str, Any], results: Results) -> None:
    """The panel below the text; on stderr, so that stdout is the text alone."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    statistics = results.statistics
    seconds = statistics.total_seconds
    rule = f" ({about['rule']})" if about["rule"] and about["guarantee"] != "exact" else ""
    parts = [f"{part} {value / seconds:.0%}" for part, value in statistics.seconds.items() if seconds and value > 0]
    over = f", as plain decoding over the cache {about['kv_cache']}" if about["kv_cache"] else ""
    lines = {
        "method": f"{method.name}{rule}, {about['guarantee']}{over}",
        "tokens": f"{statistics.tokens} in {statistics.target_passes} target passes, "
        f"{statistics.tokens_per_pass:.2f} per pass",
        "finish": ", ".join(dict.fromkeys(_finish(result) for result in results)),
    }
    if shares := statistics.acceptance_by_position:
        lines["accepted"] = " ".join(f"{share:.2f}" for share in shares) + " of draft 1, 2, ..."
    lines["speed"] = f"{statistics.tokens_per_second:.0f} tokens/s: {', '.join(parts)}"
    if statistics.cache_bytes:
        lines["cache"] = f"{statistics.cache_bytes / 1024:.0f} KiB, {statistics.cache_bits_per_value:g} bits per value"
    lines["threads"] = f"{about['threads']}, {about['dtype']}"
    table = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        table.add_row(Text(name, style="bold"), Text(value))
    Console(stderr=True).print(Panel(table, expand=False))


def _finish(result: Result) -> str:
    return result.finish_reason if result.stop is None else f"{result.finish_reason} {result.stop!r}"


# --- as JSON ----------------------------------------------------------------------------------------------------------


def _result(prompt: str, result: Result) -> dict[str, Any]:
    item: dict[str, Any] = {
        "prompt": prompt,
        "text": result.text,
        "prompt_tokens": result.prompt_tokens,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "stop": result.stop,
        "seed": result.seed,
        "statistics": _statistics(result.statistics),
    }
    if result.logprobs is not None:
        item["logprobs"] = [_finite(value) for value in result.logprobs]
    if result.top_logprobs is not None:
        item["top_logprobs"] = [[[token, _finite(value)] for token, value in row] for row in result.top_logprobs]
    return item


def _finite(value: float) -> float | None:
    """JSON has no infinity: null stands for a token without probability."""
    return value if math.isfinite(value) else None


def _statistics(statistics: Statistics) -> dict[str, Any]:
    return {
        "tokens": statistics.tokens,
        "target_passes": statistics.target_passes,
        "tokens_per_pass": statistics.tokens_per_pass,
        "drafted": statistics.drafted,
        "accepted": statistics.accepted,
        "acceptance_by_position": statistics.acceptance_by_position,
        "accepted_histogram": statistics.accepted_histogram,
        "tokens_per_s": statistics.tokens_per_second,
        "seconds": statistics.seconds,
        "cache_bytes": statistics.cache_bytes,
        "cache_bits_per_value": statistics.cache_bits_per_value,
    }
