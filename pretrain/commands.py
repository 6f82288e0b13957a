"""What each command of `python -m pretrain` does, once its arguments are parsed. Each returns the exit status."""

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

import torch

from model.generate import generate
from parallel.heartbeat import LostRankError, end_process
from parallel.launch import Place, find_place, join_processes, keep_compiled_kernels, leave_processes
from parallel.zero import load_deepspeed
from pretrain.config import check_layout, load_config
from pretrain.errors import DONE, STOPPED_EARLY, UserError

if TYPE_CHECKING:
    from pretrain.compare import Comparison


def train(arguments: Namespace) -> int:
    """`train CONFIG`."""
    from pretrain.loop import train as run
    from pretrain.origin import find_origin

    place = find_place()
    config, origin = load_config(arguments.config, arguments.set), find_origin(arguments.config, arguments.set)
    check_layout(config, place.world_size)
    load_deepspeed()
    join_processes(place)
    try:
        finished = run(config, place, origin)
    except LostRankError as error:
        end_process(error, place.rank)
    leave_processes()
    return DONE if finished else STOPPED_EARLY


def plan(arguments: Namespace) -> int:
    """`plan CONFIG`."""
    from pretrain.planning.plan import plan_command

    config = load_config(arguments.config, arguments.set)
    plan_command(
        config,
        arguments.world_size,
        arguments.device_memory,
        arguments.hardware,
        searches=arguments.search,
    )
    if arguments.dry_run or arguments.rank is not None:
        from pretrain.planning.dry_run import dry_run_command

        dry_run_command(config, arguments.world_size, arguments.rank)
    return DONE


def rehearse(arguments: Namespace) -> int:
    """`rehearse CONFIG`."""
    from pretrain.rehearsal.rehearse import rehearse as run

    config = load_config(arguments.config, arguments.set)
    return run(config, out=arguments.out, processes=arguments.processes, steps=arguments.steps)


def compare(arguments: Namespace) -> int:
    """`compare A B`."""
    from pretrain.compare import report_gap, report_together, train_runs

    place, comparison = find_place(), comparison_of(arguments)
    if arguments.only_report or not comparison.trained:
        return report_gap(comparison) if place.is_first else DONE
    for side in comparison.trained:
        check_layout(side.config, place.world_size)
    load_deepspeed()
    join_processes(place)
    try:
        finished = train_runs(comparison, place)
    except LostRankError as error:
        end_process(error, place.rank)
    status = report_together(comparison, place) if finished else STOPPED_EARLY
    leave_processes()
    return status


def comparison_of(arguments: Namespace) -> "Comparison":
    """What `compare` is asked for."""
    from pretrain.compare import plan_comparison

    return plan_comparison(
        (arguments.a, arguments.b),
        overrides=arguments.set,
        overrides_b=arguments.set_b,
        steps=arguments.steps,
        num_seeds=arguments.seeds,
        out=arguments.out,
        limit=arguments.limit / 100,
    )


def report(arguments: Namespace) -> int:
    """`report RUN` and `report A B`."""
    from pretrain.reports.report import write_report
    from pretrain.reports.side_by_side import write_side_by_side

    if len(arguments.runs) > 1:
        print(write_side_by_side(arguments.runs, arguments.out))
    elif arguments.out:
        raise UserError("--out names the page of several runs; the page of one lies in its folder")
    else:
        print(write_report(arguments.runs[0]))
    return DONE


def watch(arguments: Namespace) -> int:
    """`watch RUN`."""
    from pretrain.reports.watch import watch as show

    show(arguments.run, once=arguments.once)
    return DONE


def export(arguments: Namespace) -> int:
    """`export CHECKPOINT OUT`."""
    from pretrain.hf.folder import export_folder
    from pretrain.weights import open_weights

    weights = open_weights(arguments.checkpoint, averaged=arguments.ema)
    notes = export_folder(
        weights.config,
        weights.tensors(),
        arguments.out,
        dtype=arguments.dtype,
        max_position_embeddings=weights.context_length,
        eos_token_id=weights.eos,
        tokenizer_file=weights.tokenizer_file,
    )
    _say_all(notes)
    print(arguments.out)
    return DONE


def import_(arguments: Namespace) -> int:
    """`import HF_FOLDER OUT`."""
    from pretrain.hf.folder import import_folder
    from pretrain.weights import write_weights

    imported = import_folder(arguments.folder)
    write_weights(
        arguments.out,
        imported.config,
        imported.tensors,
        context_length=imported.max_position_embeddings,
        eos=imported.eos_token_id,
        tokenizer_file=imported.tokenizer_file,
    )
    _say_all(imported.notes)
    print(arguments.out)
    return DONE


def evaluate(arguments: Namespace) -> int:
    """`eval CHECKPOINT`."""
    from pretrain.perplexity import print_perplexity

    with _alone() as place:
        print_perplexity(
            arguments.checkpoint,
            place,
            folders=arguments.data,
            baselines=arguments.baselines,
            limit=arguments.samples,
            seq_len=arguments.seq_len,
            micro_batch_size=arguments.micro_batch_size,
        )
    return DONE


def generate_text(arguments: Namespace) -> int:
    """`generate CHECKPOINT --prompt TEXT`: the text appears as it is made."""
    from pretrain.weights import open_weights

    weights = open_weights(arguments.checkpoint)
    tokenizer = weights.tokenizer()
    device = find_place({}).device
    if device.type == "cuda":
        keep_compiled_kernels()
    model = weights.build(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    tokens = tokenizer.encode_batch([arguments.prompt])[0]
    if not len(tokens):
        raise UserError("--prompt is empty; give at least one character")
    made: list[int] = []
    shown = ""
    print(arguments.prompt, end="", flush=True)
    for token in generate(
        model,
        torch.as_tensor([list(tokens)], device=device),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        generator=torch.Generator(device).manual_seed(arguments.seed),
        absorbed=not arguments.decompress,
    ):
        if int(token) == weights.eos:
            break
        made.append(int(token))
        text = tokenizer.decode([*tokens, *made])[len(tokenizer.decode(list(tokens))) :]
        # A character may need several tokens; what is not whole yet is shown later.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    return DONE


def _say_all(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(note, file=sys.stderr)


class _alone:
    """A group of this one process."""

    def __enter__(self) -> Place:
        place = find_place({})
        join_processes(place)
        return place

    def __exit__(self, *_: object) -> None:
        leave_processes()
