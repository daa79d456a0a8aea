"""`ldmole eval`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ldmole_dist.cli_arguments import positive
from ldmole_dist.errors import UserError

EVAL = """Evaluates a run's adapter, or a saved one, on held-out rows: loss and perplexity of answers; accuracy where they are
letters, choices or classes, with F1 and Matthews correlation where all rows choose among the same; all of it by domain. On many
ranks, under any ZeRO stage: start it with torchrun, mpirun or deepspeed. --lm-eval runs tasks of the LM Evaluation Harness."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldmole eval`."""
    parser.add_argument("run_or_adapter", metavar="RUN_OR_ADAPTER", help="folder of a run, or of an adapter")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the run's config")
    parser.add_argument("--data", metavar="FILE", help="to evaluate on; default: the run's data.eval")
    parser.add_argument("--no-adapter", action="store_true", help="evaluate the frozen backbone, for comparison")
    parser.add_argument(
        "--likelihood",
        action="store_true",
        help="choose the answer whose text is the most likely; default: by its first token (a letter, a word)",
    )
    parser.add_argument("--backbone", metavar="PATH", help="if it is not where the run or the adapter says")
    parser.add_argument("--limit", type=positive, metavar="ROWS", help="of each source, from its start")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="rows of a forward (default: twice the run's)")
    parser.add_argument("--lm-eval", metavar="TASKS", help="tasks of lm-eval, with commas; needs pip install lm_eval")
    parser.add_argument("--lm-eval-path", metavar="FOLDER", help="with tasks of your own")
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples in the prompts of lm-eval (default: the task's)"
    )
    parser.add_argument("--output", metavar="FILE", help="write the results as JSON")
    parser.set_defaults(call=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate; only rank 0 prints and writes.

    Raises:
        UserError, PeerError: where something is not as it must be.
    """
    if args.lm_eval is None and (args.lm_eval_path is not None or args.num_fewshot is not None):
        raise UserError("--lm-eval-path and --num-fewshot are for --lm-eval TASKS")
    if args.output is not None and not Path(args.output).absolute().parent.is_dir():
        raise UserError(f"--output {args.output}: there is no such folder; make it first")
    if args.lm_eval is not None:
        from ldmole_dist.evaluation.lm_eval_bridge import run_lm_eval  # says at once where the harness is not installed
    from ldmole_dist.evaluation.model import config_of, prepared, rows_and_encoder
    from ldmole_dist.model.saved import find_saved_model

    saved = find_saved_model(args.run_or_adapter, args.backbone)
    config = config_of(saved, args.overrides, args.data, args.limit, args.batch_size)
    rows, encoder = rows_and_encoder(config) if args.lm_eval is None else ([], None)
    with prepared(config, with_adapter=not args.no_adapter) as model:
        if encoder is not None:
            from ldmole_dist.evaluation.rows import evaluate_rows

            found = evaluate_rows(model, encoder, rows, args.likelihood)
            scored = "likelihood" if args.likelihood else "first token" if encoder.task == "causal_lm" else "class"
            result = {"chosen_by": scored} | found
        else:
            result = run_lm_eval(model, args.lm_eval.split(","), args.lm_eval_path, args.num_fewshot, args.limit)
        is_main = model.process.is_main
    if is_main:
        adapter = None if args.no_adapter else str(saved.adapter)
        result = {"subject": args.run_or_adapter, "backbone": config.backbone.path, "adapter": adapter} | result
        print(table(result))
        if args.output is not None:
            _write(Path(args.output), result)
    return 0


def table(result: dict[str, Any]) -> str:
    """Results as lines of columns."""
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
        text.append(f"{domain:{width}}" + "".join(f"{_cell(values, name):>18}" for name in columns))
    return "\n".join(text)


def _cell(values: dict[str, float], name: str) -> str:
    if name not in values:
        return "-"
    if name == "rows":
        return str(values[name])
    if f"{name}_stderr" in values:
        return f"{100 * values[name]:.2f} ± {100 * values[f'{name}_stderr']:.2f} %"
    return f"{values[name]:.4f}"


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(result, indent=1, default=str) + "\n")
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror or error}; choose another place") from error
    print(f"results: {path}", file=sys.stderr)
