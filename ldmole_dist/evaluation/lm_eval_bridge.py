"""Run tasks of the LM Evaluation Harness, with any ZeRO stage and expert-parallel size.

Every rank runs the harness with all requests; `Evaluator` distributes the forward passes over the ranks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ldmole_dist.data.encode import Encoded
from ldmole_dist.distributed import broadcast_from_main, raise_on_all_ranks
from ldmole_dist.errors import UserError
from ldmole_dist.evaluation.model import DistributedModel
from ldmole_dist.generation.generate import Sampling, generate_batch
from ldmole_dist.loss import IGNORED

try:
    from lm_eval import simple_evaluate, utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(
        f"--lm-eval requires the LM Evaluation Harness ({error}); run `pip install 'lm_eval>=0.4.13,<0.5'`."
    ) from error


def run_lm_eval(
    model: DistributedModel, tasks: Sequence[str], folder: str | None, num_fewshot: int | None, limit: int | None
) -> dict[str, Any]:
    """Run tasks of the harness. Collective: every rank must call it.

    Args:
        model: causal language model to evaluate.
        tasks: names of tasks or groups.
        folder: folder with additional tasks.
        num_fewshot: number of examples in each prompt; None uses the task's default.
        limit: maximum number of documents of each task; None uses all.

    Returns:
        "lm_eval": results of each task, with the metric names of the harness. "versions": version of each task.

    Raises:
        UserError, PeerError: on every rank, if the model is a classifier, the folder does not exist, a task is unknown, the
            data of a task cannot be loaded, or a task generates text and there are several ranks.
    """
    if model.config.backbone.task != "causal_lm":
        raise UserError(
            f"--lm-eval requires backbone.task=causal_lm, but the config has {model.config.backbone.task}; evaluate without "
            "--lm-eval."
        )
    if folder is not None and not os.path.isdir(folder):
        raise UserError(f"--lm-eval-path {folder}: the folder does not exist; check the path.")
    with raise_on_all_ranks("loading the tasks"):
        manager = TaskManager(include_path=folder)
        if unknown := [task for task in tasks if not manager.match_tasks([task])]:
            raise UserError(
                f"unknown lm-eval tasks: {', '.join(unknown)}; use names that `lm_eval ls tasks` prints, or set --lm-eval-path "
                "to the folder that defines them."
            )
        try:
            # simple_evaluate loads the tasks again, from the cache. They are loaded here first, because an error in
            # simple_evaluate would leave the other ranks waiting in a collective.
            manager.load(list(tasks))
        except Exception as error:  # the errors have no common base class: network, missing file, unexpected data
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"cannot load the lm-eval tasks {', '.join(tasks)} ({reason}); correct their data or, without access to the "
                "hub, define tasks that read local files and set --lm-eval-path."
            ) from error
    results: Any = simple_evaluate(
        LdMoleLM(model),
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1000,
    )
    # The harness returns results on the first rank of each node only.
    return broadcast_from_main(results and {"lm_eval": results["results"], "versions": results["versions"]})


class LdMoleLM(TemplateLM):
    """The harness's model interface (`lm_eval.api.model.TemplateLM`), implemented with a `DistributedModel`."""

    def __init__(self, model: DistributedModel) -> None:
        super().__init__()
        self.model, self.tokenizer = model, model.tokenizer
        self._device = model.process.device
        positions = getattr(model.engine.module.config, "max_position_embeddings", None)
        self.max_length = int(positions or model.tokenizer.model_max_length)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, **special)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        examples = []
        for _texts, context, continuation in requests:
            # Remove tokens at the start of a sequence that is too long, which keeps the continuation.
            ids = (context + continuation)[-self.max_length :]
            labels = ([IGNORED] * len(context) + continuation)[-self.max_length :]
            examples.append(Encoded(ids, labels))
        outcomes = self.model.outcomes(examples, "lm-eval")
        return [(-loss, bool(greedy)) for loss, greedy in zip(outcomes.loss_N.tolist(), outcomes.greedy_N, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,  # each window has one more token, the context of its first prediction
                context_len=1,
            )
            text_windows = [(None, *utils.make_disjoint_window(window)) for window in rolling]
            windows += text_windows
            counts.append(len(text_windows))
        scores = iter([score for score, _ in self._loglikelihood_tokens(windows)])
        return [sum(next(scores) for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        if self.model.process.world_size > 1:
            raise UserError(
                "lm-eval tasks that generate text run in one process only, because ranks would generate different numbers of "
                "tokens; start ldmole eval without a launcher."
            )
        answers = []
        for request in requests:
            prompt, settings = request.args
            stops = settings.get("until") or []
            stops = [stops] if isinstance(stops, str) else list(stops)
            sampling = Sampling(
                max_new_tokens=int(settings.get("max_gen_toks", 256)),
                temperature=float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0,
                top_p=float(settings.get("top_p", 1.0)),
            )
            (text,) = generate_batch(self.model.engine.module, self.tokenizer, [prompt], sampling, stop=stops)
            for stop in stops:
                text = text.partition(stop)[0] if stop else text
            answers.append(text)
        return answers
