"""uptrain(): student folder -> uptrained folder, checked first, resumable, whole or not there."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..card import CARD, read_card, version
from ..io.atomic_output import MARKER, check_destination, locked, partial_folder
from ..io.checkpoint import open_checkpoint
from ..io.journal import differences, sha256_of
from ..io.text import public_name
from ..precision import products, slow_note
from .data import EVAL_ROWS, ROWS, write_rows
from .hooks import Hooks
from .memory import check_fits, free_bytes, in_one_memory, need, training_device, uses_cpu
from .models import check_same_words, choose_trained, count, load_tokenizer, outline, positions_of
from .options import AUTO, UptrainOptions
from .record import UPTRAIN_RECORD, card_with, recovered

if TYPE_CHECKING:
    from .training import Trained

IDENTITY, CONTROL = "uptrain-run.json", "control.json"


@dataclass(frozen=True, kw_only=True)
class UptrainResult:
    output: Path
    record: dict[str, Any]  # what uptrain.json holds
    seconds: float


def uptrain(options: UptrainOptions, hooks: Hooks | None = None) -> UptrainResult:
    """Train the student on its teacher's distributions, and write it to `options.output`.

    The output appears under its name only when complete: the trained weights in the student's
    stored dtype, its tokenizer and other files, ``uptrain.json`` and the model card's section.
    Meanwhile ``OUTPUT.partial/`` holds the packed text and the checkpoints; an interrupted run
    leaves it, and the same options with `resume` continue to the same weights.

    In each process of ``accelerate launch`` or ``torchrun`` the same call is to be made.

    Raises ValueError for misuse or bad input before anything is loaded, :class:`Diverged` (a
    RuntimeError) when the loss is no number: the last good checkpoint stays in
    ``OUTPUT.partial/``.
    """
    begin = time.perf_counter()
    hooks = hooks or Hooks()
    options = checked(with_precision(options, hooks.say))
    from .training import save_model, train_one, training_arguments

    output, work = Path(options.output), partial_folder(Path(options.output))
    arguments = training_arguments(options, work)  # also joins the group of processes
    with ExitStack() as stack:
        with arguments.main_process_first(local=False):
            if arguments.process_index == 0:
                work.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(work / MARKER))
                try:
                    _prepare(options, work)
                except ValueError:
                    _leave_if_empty(work)
                    raise
        control = _control(options, work, hooks, train_one) if options.control else None
        trained = train_one(options, work, hooks, "student")
        record = _record(options, trained, control, seconds=time.perf_counter() - begin)
        folder = work / "model"
        save_model(trained, folder)
        if arguments.process_index == 0:
            _finish(options, work, folder, record)
        arguments.distributed_state.wait_for_everyone()
    return UptrainResult(output=output, record=record, seconds=time.perf_counter() - begin)


def checked(options: UptrainOptions) -> UptrainOptions:
    """The options with rows that the model has positions for, and a number of tokens.

    Raises ValueError unless everything named is there, belongs together and fits.
    """
    student, output = Path(options.student), Path(options.output)
    teacher = None if options.teacher is None else Path(options.teacher)
    open_checkpoint(student)
    check_destination(student, output)
    model = outline(student)
    choose_trained(model, options.train)
    load_tokenizer(student)
    theirs = None
    if teacher is not None:
        theirs = open_checkpoint(teacher)
        check_destination(teacher, output)
        check_same_words(student, teacher)
    weights, trained = count(model)
    found = need(options, weights, trained, theirs)
    check_fits(in_one_memory(found, on_cpu=uses_cpu(options.device)), *free_bytes(options.device))
    length = min(options.sequence_length, positions_of(model) or options.sequence_length)
    return replace(options, sequence_length=length, tokens=options.budget(weights))


def with_precision(options: UptrainOptions, say: Callable[[str], None]) -> UptrainOptions:
    """The options with a precision of the device in the place of auto; `say` is told which, and
    why, and warned of one that will be slow there."""
    device = training_device(options.device)
    if options.precision == AUTO:
        found = products(torch.bfloat16, device)
        options = replace(options, precision="bf16" if found.fast else "float32")
        say(f"precision {options.precision}: {found.why}")
        return options
    note = slow_note(torch.bfloat16, device, "use --precision auto or float32")
    if note and options.precision != "float32":
        say(f"precision {options.precision}: {note}")
    return options


def _prepare(options: UptrainOptions, work: Path) -> None:
    """The packed text in `work`: what an interrupted run left if it is resumed, else made anew."""
    identity = _identity(options)
    path = work / IDENTITY
    if options.resume and path.exists():
        old = json.loads(path.read_text())
        if changed := differences(old, identity):
            raise ValueError(
                f"{work} cannot be resumed, it was begun differently ({'; '.join(changed)}); "
                "leave out --resume to begin anew"
            )
        return
    for left in work.iterdir():
        if left.name != MARKER:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    length, tokens = options.sequence_length, options.tokens
    assert tokens is not None
    write_rows(
        work / ROWS,
        work / EVAL_ROWS,
        options.text,
        options.eval_text,
        load_tokenizer(Path(options.student)),
        length=length,
        rows=max(1, -(-tokens // length)),
        eval_rows=max(1, options.eval_tokens // length),
        seed=options.seed,
    )
    path.write_text(json.dumps(identity, indent=2) + "\n")  # last: rows are whole


def _identity(options: UptrainOptions) -> dict[str, Any]:
    """What must be the same in a run that is resumed."""
    folders = {"student": options.student, "teacher": options.teacher}
    texts = [*options.text, *([options.eval_text] if options.eval_text else [])]
    recipe = {
        f"recipe.{name}": value
        for name, value in options.recipe().items()
        if name not in ("device", "control")  # neither changes what is computed
    }
    identity = recipe | {
        "version": version(),
        "text": [sha256_of(Path(t)) if Path(t).is_file() else t for t in texts],
        **{
            name: folder and open_checkpoint(Path(folder)).fingerprint()
            for name, folder in folders.items()
        },
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def _control(
    options: UptrainOptions, work: Path, hooks: Hooks, train_one: Callable[..., Trained]
) -> list[dict[str, Any]]:
    """The evaluations of the teacher trained by the same recipe; kept in `work` once known."""
    path = work / CONTROL
    if not path.exists():
        assert options.teacher is not None
        same = replace(options, student=options.teacher)
        trained = train_one(same, work, hooks, "control")
        if trained.is_main:
            path.write_text(json.dumps(trained.steps))
        return list(trained.steps)
    steps: list[dict[str, Any]] = json.loads(path.read_text())
    return steps


def _record(
    options: UptrainOptions,
    trained: Trained,
    control: list[dict[str, Any]] | None,
    *,
    seconds: float,
) -> dict[str, Any]:
    steps = trained.steps
    record: dict[str, Any] = {
        "made_by": f"hf-attn-patch {version()}",
        "student": public_name(options.student),
        "teacher": None if options.teacher is None else public_name(options.teacher),
        "text": [public_name(name) for name in options.text],
        "eval_text": None if options.eval_text is None else public_name(options.eval_text),
        "recipe": options.recipe(),
        "tokens": steps[-1]["tokens"],
        "steps_planned": trained.planned,
        "stopped_early": steps[-1]["step"] < trained.planned,
        "processes": trained.processes,
        "seconds": round(seconds, 1),
        "steps": steps,
        "train_loss": trained.losses,
    }
    if control is not None:
        gained = recovered(steps[0]["ce"], steps[-1]["ce"], control[-1]["ce"])
        record |= {"control": control, "recovered_percent": gained}
    return record


def _finish(options: UptrainOptions, work: Path, folder: Path, record: dict[str, Any]) -> None:
    """The student's other files and the record beside the weights; then the name, last of all."""
    from ..io.atomic_output import sync_folder, write_json

    student, output = Path(options.student), Path(options.output)
    for name in open_checkpoint(student).side_files():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(student / name, place)
    for left in (UPTRAIN_RECORD, CARD):
        (folder / left).unlink(missing_ok=True)
    write_json(folder / UPTRAIN_RECORD, record)
    card = card_with(read_card(student), output.name, record)
    (folder / CARD).write_text(card, encoding="utf-8", errors="surrogateescape")
    logs = work / "student" / "runs"
    if logs.is_dir():
        shutil.move(logs, folder / "runs")
    sync_folder(folder)
    if output.exists():
        output.rmdir()  # empty, or this raises and nothing is lost
    folder.rename(output)
    sync_folder(output.parent)
    shutil.rmtree(work)


def _leave_if_empty(work: Path) -> None:
    """Nothing that could be resumed: no trace."""
    if not (work / IDENTITY).exists():
        shutil.rmtree(work)
