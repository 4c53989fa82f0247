"""One training from packed rows to weights in memory: the Trainer set up, estimated and run."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..io.checkpoint import CONFIG
from ..io.reading import load_config
from .callbacks import Plateau, Steps, Whole, clear_torn, last_checkpoint
from .data import EVAL_ROWS, ROWS, PackedRows
from .hooks import Estimate, Hooks
from .memory import is_sharded
from .models import choose_trained, load_model
from .options import UptrainOptions
from .record import steps_of
from .trainer import Uptrainer

BETAS = (0.9, 0.95)
LOGGED = 100  # training losses kept
FORWARD = 0.4  # of the time of a step that an evaluation of as many tokens takes


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished training."""

    trainer: Uptrainer
    steps: list[dict[str, Any]]  # see record.steps_of
    losses: list[list[float]]  # (tokens, mean training loss since the last)
    planned: int  # steps
    stored_dtype: torch.dtype
    processes: int

    @property
    def is_main(self) -> bool:
        return self.trainer.is_world_process_zero()


def training_arguments(options: UptrainOptions, folder: Path, **more: Any) -> TrainingArguments:
    """The Trainer's own settings for a recipe."""
    sharded_bf16 = options.precision == "bf16" and is_sharded()
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        bf16=sharded_bf16,  # FSDP and DeepSpeed must know; else Uptrainer casts by itself
        # said aloud where there is nothing else: or many processes do not find each other
        use_cpu=options.device == "cpu" or not torch.accelerator.is_available(),
        seed=options.seed,
        data_seed=options.seed,
        report_to=[] if options.report_to == "none" else options.report_to.split(","),
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
        save_total_limit=2,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        **more,
    )


def train_one(options: UptrainOptions, work: Path, hooks: Hooks, what: str) -> Trained:
    """Train `options.student` on the rows in `work`; checkpoints go to ``work/what``."""
    folder, length = work / what, options.sequence_length
    rows, held_out = (PackedRows(work / name, length) for name in (ROWS, EVAL_ROWS))
    processes = max(1, training_arguments(options, folder).world_size)
    per_step = options.batch_size * options.accumulate * processes
    assert options.tokens is not None
    steps = max(1, round(options.tokens / (per_step * length)))
    every = math.ceil(steps / options.evaluations)
    resumed = last_checkpoint(folder)
    shards = load_time_shards(options, processes)
    arguments = training_arguments(
        options,
        folder,
        max_steps=steps,
        warmup_steps=round(options.warmup * steps),
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=resumed is None,
        # transformers cannot save the optimizer of a model that was sharded as it was loaded
        save_strategy="steps" if shards == 1 else "no",
        save_steps=every,
        logging_steps=max(1, math.ceil(steps / LOGGED)),
    )
    with arguments.main_process_first(local=False):
        if arguments.process_index == 0:
            clear_torn(folder)
    trainer, stored = _trainer(options, arguments, rows, held_out, hooks, what)
    hooks.announce(
        Estimate(
            what=what,
            tokens=steps * per_step * length,
            steps=steps,
            tokens_per_step=per_step * length,
            passes=steps * per_step / len(rows),
            seconds=None if is_sharded() else _seconds(trainer, steps, every),
        )
    )
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    history = trainer.state.log_history
    if steps_of(history, 1)[-1]["step"] < trainer.state.global_step:
        trainer.evaluate()
    losses = [[e["step"] * per_step * length, e["loss"]] for e in history if "loss" in e]
    return Trained(
        trainer=trainer,
        steps=steps_of(history, per_step * length),
        losses=losses,
        planned=steps,
        stored_dtype=stored,
        processes=processes,
    )


def _trainer(
    options: UptrainOptions,
    arguments: TrainingArguments,
    rows: PackedRows,
    held_out: PackedRows,
    hooks: Hooks,
    what: str,
) -> tuple[Uptrainer, torch.dtype]:
    """(the Trainer, the dtype in which the student is stored)"""
    from transformers import PrinterCallback, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()

    set_seed(options.seed)
    student = Path(options.student)
    weights = torch.bfloat16 if options.precision == "bf16-weights" else torch.float32
    shards = load_time_shards(options, arguments.world_size)
    model = load_model(student, weights, options.attn_implementation, shards)
    choose_trained(model, options.train)
    if options.gradient_checkpointing:
        # the first name is transformers' newer one
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(model, name) for name in names if hasattr(model, name))
        enable({"use_reentrant": False})
    teacher = None
    if options.teacher is not None:
        dtype = torch.float32 if options.precision == "float32" else "auto"
        teacher = load_model(Path(options.teacher), dtype, options.attn_implementation, shards)
    trainer = Uptrainer(
        model,
        arguments,
        teacher=teacher,
        kl_weight=options.kl_weight,
        autocast=options.precision == "bf16" and not arguments.bf16,
        train_dataset=rows,
        eval_dataset=held_out,
        callbacks=[
            Steps(hooks.progress, hooks.say, what),
            Plateau(options.patience, options.min_gain),
            *([Whole()] if shards == 1 else []),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    stored = getattr(load_config(student), "dtype", None)
    return trainer, stored if isinstance(stored, torch.dtype) else torch.float32


def load_time_shards(options: UptrainOptions, processes: int) -> int:
    """Into how many parts transformers is to shard the models as it loads them.

    accelerate shards on accelerators only, and would train whole copies on CPUs saying nothing.
    """
    on_cpu = options.device == "cpu" or not torch.accelerator.is_available()
    return processes if is_sharded("FSDP") and on_cpu else 1


def _seconds(trainer: Uptrainer, steps: int, every: int) -> float:
    """Of the whole training, from one batch forth and back; a first one warms up.

    Without what processes exchange.
    """
    arguments, model = trainer.args, trainer.model
    rows: Any = trainer.train_dataset
    held_out: Any = trainer.eval_dataset
    assert model is not None
    at_once = arguments.per_device_train_batch_size
    batch = torch.utils.data.default_collate([rows[i % len(rows)] for i in range(at_once)])
    batch = {name: value.to(arguments.device) for name, value in batch.items()}
    devices = [arguments.device] if arguments.device.type == "cuda" else []
    taken = 0.0
    with torch.random.fork_rng(devices):
        for _ in range(2):
            begin = time.perf_counter()
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, batch)
            loss.backward()
            loss.item()  # waits for the device
            taken = time.perf_counter() - begin
    model.zero_grad(set_to_none=True)
    processes: int = arguments.world_size
    batches = math.ceil(len(held_out) / (at_once * processes))
    evaluations = 1 + math.ceil(steps / every)
    return taken * (steps * arguments.gradient_accumulation_steps + FORWARD * evaluations * batches)


def save_model(trained: Trained, folder: Path) -> None:
    """The weights in the dtype in which the student was stored, and its config."""
    trainer = trained.trainer
    accelerator = trainer.accelerator
    # Shards are put together: all processes take part.
    # DeepSpeed gives it to the first process only.
    gathered = accelerator.get_state_dict(trainer.model_wrapped) or {}
    state = {name: whole(value) for name, value in gathered.items()}
    if not trained.is_main:
        return
    model: Any = accelerator.unwrap_model(trainer.model_wrapped)
    state = {
        name: value.to(trained.stored_dtype) if value.is_floating_point() else value
        for name, value in state.items()
        if name not in tied(model)
    }
    shutil.rmtree(folder, ignore_errors=True)
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        # Its save_pretrained() would gather again, in all processes, and write tied weights twice.
        from huggingface_hub import save_torch_state_dict

        folder.mkdir()
        save_torch_state_dict(state, folder)
        model.config.save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / CONFIG).read_text())
    config["dtype"] = str(trained.stored_dtype).removeprefix("torch.")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def tied(model: Any) -> set[str]:
    """The output matrix where it is the input's: a name that a checkpoint leaves out."""
    head = model.get_output_embeddings()
    if not model.config.get_text_config().tie_word_embeddings:
        return set()
    return {f"{name}.weight" for name, module in model.named_modules() if module is head}


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor's shards of all processes in one."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value
