"""Text benchmarks of a checkpoint with lm-eval: `python -m casp_eval.lm_eval --model DIR --tasks arc_easy`.

Needs the extra `lm-eval` (https://github.com/EleutherAI/lm-evaluation-harness). The checkpoint is loaded as for all
our evaluations and handed over as a model object, so that compressed checkpoints, multimodal ones among them, and
--dtype mean the same here as everywhere else.
"""

from pathlib import Path
from typing import Any

from casp.cli import Parser, add_device_arguments, model_folder, run_main
from casp.errors import UserError
from casp.reading.config import open_config
from casp_eval.harness import add_harness_arguments, check_harness, check_tasks, named_failures
from casp_eval.loading import Checkpoint, open_checkpoint, require_images
from casp_eval.options import check_output, write_figure


def evaluate(
    checkpoint: Checkpoint,
    tasks: list[str],
    include: Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    images: bool = False,
) -> dict[str, dict[str, Any]]:
    """lm-eval's own results: {task: {"METRIC,FILTER": value, ...}}.

    tasks: names that lm-eval knows or that a YAML under `include` defines; limit: documents per task, None for all;
    few_shot: examples before each question, None for the task's own number; chat: put every request through the
    model's chat template; images: the tasks show pictures. UserError for an unknown task and where data cannot be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.hf_vlms import HFMultimodalLM
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include))
    check_tasks(tasks, manager.all_tasks, include)
    if images:
        # It opens the processor of the model's folder itself, and knows a Llava's nesting of pictures.
        model = HFMultimodalLM(checkpoint.model, backend="causal", batch_size=batch_size, convert_img_format=True)
    else:
        model = HFLM(checkpoint.model, backend="causal", tokenizer=checkpoint.tokenizer, batch_size=batch_size)
    with named_failures(tasks):
        found = simple_evaluate(
            model,
            tasks=tasks,
            task_manager=manager,
            limit=limit,
            num_fewshot=few_shot,
            apply_chat_template=chat,
            log_samples=False,
        )
    return found["results"]


def main(arguments: list[str] | None = None) -> None:
    """Measure and print, or write, JSON."""
    parser = Parser(prog="lm_eval.sh", description="Benchmarks of lm-eval on a checkpoint, as JSON.")
    add_harness_arguments(parser, "lm-eval")
    parser.add_argument(
        "--apply-chat-template", action="store_true", help="put every request through the chat template (default: off)"
    )
    parser.add_argument(
        "--images",
        action="store_true",
        help="the tasks show pictures: ask a multimodal model; wants --apply-chat-template (default: off)",
    )
    add_device_arguments(parser)
    options = parser.parse_args(arguments)
    check_output(options.output, options.model, options.include_path)
    folder = model_folder(options.model)
    if options.images:
        if not options.apply_chat_template:
            raise UserError("--images needs --apply-chat-template, which places the pictures; give both.")
        require_images(folder, open_config(folder))
    check_harness(options.tasks, options.include_path, "lm_eval", "lm-eval")
    results = evaluate(
        open_checkpoint(options.model, options.device, options.dtype),
        options.tasks,
        options.include_path,
        options.limit,
        options.num_fewshot,
        options.batch_size,
        options.apply_chat_template,
        options.images,
    )
    write_figure({"model": options.model, "results": results}, options.output)


if __name__ == "__main__":
    run_main(main)
