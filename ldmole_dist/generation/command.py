"""`ldmole generate`: generate text for prompts from the command line, a file or standard input."""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import Any

from ldmole_dist.cli_arguments import positive
from ldmole_dist.errors import UserError

GENERATE = """Generate text with the adapter of a run, or a saved adapter, in one process. The output for prompts on the command
line is streamed; the prompts of --file are processed in batches. Without either, prompts are read from standard input."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ldmole generate`."""
    parser.add_argument("subject", metavar="RUN_OR_ADAPTER", help="folder of a run or an adapter")
    parser.add_argument("prompts", nargs="*", help="texts to continue; \\n stands for a line break")
    parser.add_argument(
        "--file",
        help='file of prompts: .txt with one per line, or .jsonl, .json, .csv or .parquet records with "prompt" or "messages"',
    )
    parser.add_argument(
        "--output", metavar="FILE", help="JSON-lines file to write the output of --file to; an existing file is resumed"
    )
    parser.add_argument(
        "--chat", action="store_true", help="treat prompts as user messages and apply the chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message; requires --chat")
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=64,
        metavar="N",
        help="maximum number of tokens to generate per prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=_non_negative,
        default=0.0,
        help="sampling temperature (default: 0, which always takes the most likely token)",
    )
    parser.add_argument(
        "--top-p",
        type=_probability,
        default=1.0,
        help="cumulative probability of the most likely tokens to sample from (default: 1)",
    )
    parser.add_argument(
        "--top-k", type=positive, default=0, help="number of the most likely tokens to sample from (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="prompts per batch of --file (default: %(default)s)"
    )
    parser.add_argument("--backbone", metavar="PATH", help="path of the backbone (default: from the run or adapter)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="bf16",
        help="dtype of the backbone (default: %(default)s)",
    )
    parser.add_argument("--no-adapter", action="store_true", help="generate without the adapter, for comparison")
    parser.set_defaults(call=run)


def run(args: argparse.Namespace) -> int:
    """Generate text for the prompts, and print it or write it to --output.

    Returns:
        Exit code 0.

    Raises:
        UserError: for invalid arguments, prompts or models, if WORLD_SIZE is greater than 1, or if --output cannot be written
            or does not match the prompts.
    """
    if (world_size := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise UserError(
            f"ldmole generate runs in one process, but WORLD_SIZE={world_size}: ranks would generate different numbers of "
            "tokens; start it without a launcher. A run's adapter/ holds the experts of all ranks; `ldmole checkpoint export "
            "CHECKPOINT ADAPTER` creates an adapter from a checkpoint."
        )
    if args.output is not None and args.file is None:
        raise UserError("--output requires --file; add --file FILE or omit --output.")
    if args.system is not None and not args.chat:
        raise UserError("--system requires --chat; add --chat or omit --system.")
    import torch

    from ldmole_dist.generation.generate import Sampling, generate_batch, load_generator
    from ldmole_dist.generation.prompts import make_prompt
    from ldmole_dist.model.saved import find_saved_model

    saved = find_saved_model(args.subject, args.backbone)
    model, tokenizer = load_generator(saved, args.precision, not args.no_adapter)
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k)
    torch.manual_seed(args.seed)
    for text in args.prompts:
        prompt = make_prompt(text.replace("\\n", "\n"), tokenizer, args.chat, args.system, f"prompt {text!r:.40}")
        if not prompt.templated:
            sys.stdout.write(prompt.text)
        generate_batch(
            model, tokenizer, [prompt.text], sampling, templated=prompt.templated, streamer=_streamer(tokenizer)
        )
    if args.file is not None:
        _generate_for_file(args, model, tokenizer, sampling)
    if not args.prompts and args.file is None:
        _generate_for_input(args, model, tokenizer, sampling)
    return 0


def _generate_for_file(args: argparse.Namespace, model: Any, tokenizer: Any, sampling: Any) -> None:
    """Generate text for the prompts of --file in batches. If --output exists, start at the first prompt that is not in it."""
    import torch
    from tqdm import tqdm

    from ldmole_dist.generation.generate import generate_batch
    from ldmole_dist.generation.prompts import OutputFile, read_prompts

    prompts = read_prompts(args.file, tokenizer, args.chat, args.system)
    output = None if args.output is None else OutputFile(args.output, prompts)
    first = 0 if output is None else output.done
    progress = tqdm(total=len(prompts), initial=first, unit="prompt", disable=output is None)
    for start in range(first, len(prompts), args.batch_size):
        batch = prompts[start : start + args.batch_size]
        # With the same --batch-size, a command resumed after a complete batch samples the same tokens as an uninterrupted one.
        torch.manual_seed(args.seed + start)
        texts = [""] * len(batch)
        # Templated prompts are tokenized without special tokens, so they form a batch of their own.
        for templated in {prompt.templated for prompt in batch}:
            indices = [index for index, prompt in enumerate(batch) if prompt.templated == templated]
            generated = generate_batch(
                model, tokenizer, [batch[i].text for i in indices], sampling, templated=templated
            )
            for index, text in zip(indices, generated, strict=True):
                texts[index] = text
        if output is not None:
            output.add(batch, texts)
        else:
            for prompt, text in zip(batch, texts, strict=True):
                print(text if prompt.templated else prompt.text + text)
        progress.update(len(batch))
    progress.close()


def _generate_for_input(args: argparse.Namespace, model: Any, tokenizer: Any, sampling: Any) -> None:
    """Generate text for each line of standard input.

    With --chat, each line continues the conversation; the line "/new" starts a new one.
    """
    from ldmole_dist.generation.generate import generate_batch
    from ldmole_dist.generation.prompts import render_chat

    start = [{"role": "system", "content": args.system}] if args.system else []
    turns = list(start)
    print("Type a prompt. Ctrl-D exits" + ("; /new starts a new conversation." if args.chat else "."), file=sys.stderr)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if args.chat and text.strip() == "/new":
            turns = list(start)
            continue
        if not text.strip():
            continue
        if args.chat:
            turns.append({"role": "user", "content": text})
        prompt = render_chat(turns, tokenizer, "this conversation") if args.chat else text
        (answer,) = generate_batch(
            model, tokenizer, [prompt], sampling, templated=args.chat, streamer=_streamer(tokenizer)
        )
        turns.append({"role": "assistant", "content": answer})


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _non_negative(text: str) -> float:
    value = _float_or_nan(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number that is at least 0")
    return value


def _probability(text: str) -> float:
    value = _float_or_nan(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in the range (0, 1]")
    return value


def _float_or_nan(text: str) -> float:
    # Without this function, argparse would report "invalid _probability value" for text that is not a number.
    try:
        return float(text)
    except ValueError:
        return math.nan
