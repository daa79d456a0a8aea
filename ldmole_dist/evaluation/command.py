"""`ldmole eval`: arguments and output."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ldmole_dist.cli_arguments import positive
from ldmole_dist.errors import UserError
from ldmole_dist.io import atomic_write, write_errors

EVAL = """Evaluate the adapter of a run, or a saved adapter, on held-out rows. Reports the loss and perplexity of the answers;
accuracy if the possible answers are known; macro F1 and Matthews correlation if data.labels lists them. Every metric is
reported overall and by domain. Runs on any number of ranks with any ZeRO stage; start several ranks with torchrun or
mpirun. --lm-eval runs tasks of the LM Evaluation Harness instead."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ldmole eval`."""
    parser.add_argument("run_or_adapter", metavar="RUN_OR_ADAPTER", help="folder of a run or an adapter")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="config values to override")
    parser.add_argument("--data", metavar="FILE", help="file with evaluation data (default: the run's data.eval)")
    parser.add_argument("--no-adapter", action="store_true", help="evaluate the backbone without the adapter")
    parser.add_argument(
        "--likelihood",
        action="store_true",
        help="choose the answer with the highest likelihood (default: the one with the most likely first token)",
    )
    parser.add_argument("--backbone", metavar="PATH", help="path of the backbone (default: from the run or adapter)")
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="ROWS",
        help="maximum number of rows of each source, or of documents of each lm-eval task (default: the run's data.eval_limit; "
        "all with --data or --lm-eval)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="sequences per forward pass of a rank (default: twice the run's micro-batch size)",
    )
    parser.add_argument(
        "--lm-eval",
        metavar="TASKS",
        help="comma-separated lm-eval tasks to run; requires `pip install 'lm_eval>=0.4.13,<0.5'`",
    )
    parser.add_argument("--lm-eval-path", metavar="FOLDER", help="folder with additional lm-eval tasks")
    parser.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="number of few-shot examples per lm-eval prompt (default: the task's)",
    )
    parser.add_argument("--output", metavar="FILE", help="JSON file to write the results to")
    parser.set_defaults(call=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate a model; rank 0 prints the results and writes them to --output. Collective: every rank must call it.

    Returns:
        Exit code 0.

    Raises:
        UserError, PeerError: for invalid arguments, data or models, or if --output cannot be written.
    """
    if args.lm_eval is None and (args.lm_eval_path is not None or args.num_fewshot is not None):
        raise UserError("--lm-eval-path and --num-fewshot require --lm-eval; add --lm-eval TASKS or omit them.")
    if args.output is not None and not Path(args.output).absolute().parent.is_dir():
        raise UserError(f"--output {args.output}: its folder does not exist; create it first.")
    if args.lm_eval is not None:
        # Imported before the model is loaded: the import raises an error if the harness is not installed.
        from ldmole_dist.evaluation.lm_eval_bridge import run_lm_eval
    from ldmole_dist.evaluation.model import eval_config, load_distributed, load_eval_data
    from ldmole_dist.model.saved import find_saved_model

    saved = find_saved_model(args.run_or_adapter, args.backbone)
    config = eval_config(saved, args.overrides, args.data, args.limit, args.batch_size)
    rows, encoder = load_eval_data(config) if args.lm_eval is None else ([], None)
    with load_distributed(config, with_adapter=not args.no_adapter) as model:
        if encoder is not None:
            from ldmole_dist.evaluation.rows import evaluate_rows

            metrics = evaluate_rows(model, encoder, rows, args.likelihood)
            chosen_by = "likelihood" if args.likelihood else "first token" if encoder.task == "causal_lm" else "class"
            result = {"chosen_by": chosen_by} | metrics
        else:
            result = run_lm_eval(model, args.lm_eval.split(","), args.lm_eval_path, args.num_fewshot, args.limit)
        is_main = model.process.is_main
    if is_main:
        adapter = None if args.no_adapter else str(saved.adapter)
        result = {"subject": args.run_or_adapter, "backbone": config.backbone.path, "adapter": adapter} | result
        print(format_table(result))
        if args.output is not None:
            with write_errors(f"--output {args.output}"):
                atomic_write(Path(args.output), json.dumps(result, indent=1, default=str) + "\n")
            print(f"results: {args.output}", file=sys.stderr)
    return 0


def format_table(result: dict[str, Any]) -> str:
    """Return the results as a plain-text table.

    Args:
        result: result of `evaluate_rows` or of `run_lm_eval`; keys other than the metrics are ignored.
    """
    if "lm_eval" in result:
        return "\n".join(
            f"{task:32} {name:24} {value:10.4f}" if isinstance(value, float) else f"{task:32} {name:24} {value!s:>10}"
            for task, values in result["lm_eval"].items()
            for name, value in values.items()
            if name not in ("alias", "name", "sample_len", "sample_count")
        )
    columns = ["rows", "accuracy", "accuracy_norm", "f1_macro", "matthews", "loss", "perplexity"]
    lines = {"all": result["all"], **result["domains"]}
    columns = [name for name in columns if name in result["all"]]
    width = max(map(len, lines)) + 2
    text = [" " * width + "".join(f"{name:>18}" for name in columns)]
    for domain, values in lines.items():
        text.append(f"{domain:{width}}" + "".join(f"{_format_cell(values, name):>18}" for name in columns))
    return "\n".join(text)


def _format_cell(values: dict[str, float], name: str) -> str:
    if name not in values:
        return "-"
    if name == "rows":
        return str(values[name])
    if f"{name}_stderr" in values:
        return f"{100 * values[name]:.2f} ± {100 * values[f'{name}_stderr']:.2f} %"
    return f"{values[name]:.4f}"
