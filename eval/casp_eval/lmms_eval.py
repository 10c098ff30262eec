"""Multimodal benchmarks of a checkpoint with lmms-eval: `python -m casp_eval.lmms_eval --model DIR --tasks mme`.

Needs the extra `lmms-eval` (https://github.com/EvolvingLMMs-Lab/lmms-eval). Its own command line knows our
checkpoints too, as the model "casp": `python -m lmms_eval --model casp --model_args pretrained=DIR --tasks mme`.
"""

from pathlib import Path
from typing import Any

from casp.cli import Parser, add_device_arguments, add_frames_argument, model_folder, run_main
from casp.errors import UserError
from casp.model.modality import Visual
from casp_eval.harness import add_harness_arguments, check_harness, check_tasks, named_failures
from casp_eval.loading import Checkpoint, open_checkpoint
from casp_eval.options import check_output, write_figure


def manifest() -> Any:
    """What lmms-eval's entry-point group `lmms_eval.models` asks for: the name "casp" and the classes behind it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("casp", "casp_eval.lmms_model.CaspModel", "casp_eval.lmms_model.CaspChatModel")


def evaluate(
    checkpoint: Checkpoint,
    tasks: list[str],
    include: Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    frames: int = Visual.frames,
) -> dict[str, dict[str, Any]]:
    """lmms-eval's own results: {task: {"METRIC,FILTER": value, ...}}.

    tasks: names that lmms-eval knows or that a YAML under `include` defines; limit: documents per task, None for
    all; few_shot: examples before each question, None for the task's own number; chat: take finished messages
    from the tasks instead of question and media; frames: of a video. UserError for an unknown task and for one whose
    data cannot be had.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from casp_eval.lmms_model import CaspChatModel, CaspModel

    manager = TaskManager(include_path=None if include is None else str(include))
    check_tasks(tasks, manager.all_tasks, include)
    with named_failures(tasks):
        found = simple_evaluate(
            (CaspChatModel if chat else CaspModel)(checkpoint, batch_size, frames=frames),
            tasks=tasks,
            task_manager=manager,
            limit=limit,
            num_fewshot=few_shot,
            log_samples=False,
        )
    return found["results"]


def main(arguments: list[str] | None = None) -> None:
    """Measure and print, or write, JSON."""
    parser = Parser(prog="lmms_eval.sh", description="Multimodal benchmarks of lmms-eval on a checkpoint, as JSON.")
    add_harness_arguments(parser, "lmms-eval")
    parser.add_argument(
        "--chat-messages",
        action="store_true",
        help="take finished messages from the tasks, which then can neither score given answers nor show examples "
        "(default: question, pictures and videos)",
    )
    add_frames_argument(parser)
    add_device_arguments(parser)
    options = parser.parse_args(arguments)
    check_output(options.output, options.model, options.include_path)
    model_folder(options.model)
    if options.chat_messages and options.num_fewshot:
        raise UserError("--chat-messages shows no examples; leave out --num-fewshot or --chat-messages.")
    check_harness(options.tasks, options.include_path, "lmms_eval", "lmms-eval")
    checkpoint = open_checkpoint(options.model, options.device, options.dtype)
    results = evaluate(
        checkpoint,
        options.tasks,
        options.include_path,
        options.limit,
        options.num_fewshot,
        options.batch_size,
        options.chat_messages,
        options.frames,
    )
    write_figure({"model": options.model, "results": results}, options.output)


if __name__ == "__main__":
    run_main(main)
