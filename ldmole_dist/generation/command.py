"""`ldmole generate`: prompts from the command line, from a file, or typed one after the other."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from ldmole_dist.cli_arguments import positive
from ldmole_dist.errors import UserError

GENERATE = """Continues prompts with a run's adapter or a saved one, in one process. Prompts of the command line stream to the
terminal; those of a file are continued in batches; without either, what you type is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldmole generate`."""
    parser.add_argument("run_or_adapter", metavar="RUN_OR_ADAPTER", help="folder of a run, or of an adapter")
    parser.add_argument("prompts", nargs="*", help="texts to continue; \\n stands for a line break")
    parser.add_argument(
        "--file",
        help='more prompts: a .txt with one a line; "prompt" or "messages" of a .jsonl, .json, .csv or .parquet',
    )
    parser.add_argument(
        "--output", metavar="FILE", help="JSON lines for those of --file; if it is there, what it lacks is added"
    )
    parser.add_argument("--chat", action="store_true", help="prompts are what a user says, for the chat template")
    parser.add_argument("--system", metavar="TEXT", help="what the system says first, with --chat")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=_not_negative, default=0.0, help="0: the most likely token (default)")
    parser.add_argument(
        "--top-p", type=_share, default=1.0, help="draw from the likeliest of this probability together"
    )
    parser.add_argument("--top-k", type=positive, default=0, help="draw from so many of the likeliest")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="of --file (default: %(default)s)")
    parser.add_argument("--backbone", metavar="PATH", help="if it is not where the run or the adapter says")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16", help="(default: %(default)s)")
    parser.add_argument("--no-adapter", action="store_true", help="let the backbone speak, for comparison")
    parser.set_defaults(call=run)


def run(args: argparse.Namespace) -> int:
    """Generate.

    Raises:
        UserError: where something is not as it must be.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "ldmole generate runs in one process, because ranks would finish at different lengths: a run's adapter/ holds the "
            "experts of all ranks; make one of a checkpoint with: ldmole checkpoint export CHECKPOINT ADAPTER"
        )
    if args.output is not None and args.file is None:
        raise UserError("--output is for the prompts of --file")
    if args.system is not None and not args.chat:
        raise UserError("--system is for --chat")
    import torch

    from ldmole_dist.generation.continuations import Sampling, continue_batch, load_generator
    from ldmole_dist.generation.prompts import prompt_of
    from ldmole_dist.model.saved import find_saved_model

    model, tokenizer = load_generator(
        find_saved_model(args.run_or_adapter, args.backbone), args.precision, not args.no_adapter
    )
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k)
    torch.manual_seed(args.seed)
    for text in args.prompts:
        prompt = prompt_of(text.replace("\\n", "\n"), tokenizer, args.chat, args.system, f"prompt {text!r:.40}")
        if not prompt.rendered:
            sys.stdout.write(prompt.text)
        continue_batch(
            model, tokenizer, [prompt.text], sampling, rendered=prompt.rendered, streamer=_streamer(tokenizer)
        )
    if args.file is not None:
        _file(args, model, tokenizer, sampling)
    if not args.prompts and args.file is None:
        _typed(args, model, tokenizer, sampling)
    return 0


def _file(args: argparse.Namespace, model: Any, tokenizer: Any, sampling: Any) -> None:
    import torch
    from tqdm import tqdm

    from ldmole_dist.generation.continuations import continue_batch
    from ldmole_dist.generation.prompts import Continuations, read_prompts

    prompts = read_prompts(args.file, tokenizer, args.chat, args.system)
    output = None if args.output is None else Continuations(args.output, prompts)
    first = 0 if output is None else output.done
    progress = tqdm(total=len(prompts), initial=first, unit="prompt", disable=output is None)
    for start in range(first, len(prompts), args.batch_size):
        # Rendered prompts and others do not tokenise alike.
        batch = prompts[start : start + args.batch_size]
        torch.manual_seed(args.seed + start)  # whoever goes on draws what would have been drawn
        texts = [""] * len(batch)
        for kind in {prompt.rendered for prompt in batch}:
            places = [place for place, prompt in enumerate(batch) if prompt.rendered == kind]
            of_kind = continue_batch(model, tokenizer, [batch[p].text for p in places], sampling, rendered=kind)
            for place, text in zip(places, of_kind, strict=True):
                texts[place] = text
        if output is not None:
            output.add(batch, texts)
        else:
            for prompt, text in zip(batch, texts, strict=True):
                print(text if prompt.rendered else prompt.text + text)
        progress.update(len(batch))
    progress.close()


def _typed(args: argparse.Namespace, model: Any, tokenizer: Any, sampling: Any) -> None:
    """Until the end of the input; a chat goes on with what was said before."""
    from ldmole_dist.generation.continuations import continue_batch
    from ldmole_dist.generation.prompts import rendered

    start = [{"role": "system", "content": args.system}] if args.system else []
    turns = list(start)
    print("Type a prompt; Ctrl-D ends" + (", /new begins another conversation." if args.chat else "."), file=sys.stderr)
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
        prompt = rendered(turns, tokenizer, "this conversation") if args.chat else text
        (answer,) = continue_batch(
            model, tokenizer, [prompt], sampling, rendered=args.chat, streamer=_streamer(tokenizer)
        )
        turns.append({"role": "assistant", "content": answer})


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must not be negative")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be more than 0 and at most 1")
    return value
