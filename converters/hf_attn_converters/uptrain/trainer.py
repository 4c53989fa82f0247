"""transformers' Trainer with this loss, this evaluation, and a stop where the loss is no number.

Overridden: `compute_loss`, `compute_loss_context_manager`, `training_step`, `prediction_step` and
`evaluate`, all public.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments

from .hooks import Diverged
from .loss import IGNORED, distillation_loss, next_tokens, token_losses

# Without a cache: with one, transformers does not look for packed documents.
NO_CACHE = {"use_cache": False}


class Uptrainer(Trainer):
    """Trains on ``kl_weight`` KL from `teacher` and cross-entropy for the rest.

    `autocast` to bfloat16 is done here and not by accelerate, which would make float32 copies of
    all logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        teacher: PreTrainedModel | None,
        kl_weight: float,
        autocast: bool,
        **options: Any,
    ) -> None:
        super().__init__(model, args, compute_metrics=metrics_of(kl_weight), **options)
        # Counts the tokens of a whole step, also for models that take no such argument.
        self.model_accepts_loss_kwargs = True
        self.kl_weight, self.autocast = kl_weight, autocast
        self.teacher = None if teacher is None else self._placed(teacher)

    def _placed(self, teacher: PreTrainedModel) -> nn.Module:
        """Where the student is: sharded as it is by FSDP2 or ZeRO-3, else whole on each device."""
        teacher.eval().requires_grad_(False)
        if getattr(self.accelerator, "is_fsdp2", False):
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            prepared: nn.Module = fsdp2_prepare_model(self.accelerator, teacher)
            return prepared
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            import deepspeed

            # transformers has loaded it in parts, as it loads every model then
            engine: nn.Module = deepspeed.initialize(model=teacher, config=self._inference(plugin))[
                0
            ]
            return engine
        module: nn.Module = teacher
        return module.to(self.args.device)

    def _inference(self, plugin: Any) -> dict[str, Any]:
        """DeepSpeed's settings for a model that is not trained."""
        zero = plugin.deepspeed_config["zero_optimization"]
        return {
            "train_micro_batch_size_per_gpu": self.args.per_device_train_batch_size,
            "zero_optimization": {"stage": 3, "offload_param": zero.get("offload_param", {})},
            "bf16": {"enabled": self.args.bf16},
        }

    def compute_loss_context_manager(self) -> ExitStack:
        stack = super().compute_loss_context_manager()
        if self.autocast:
            stack.enter_context(torch.autocast(self.args.device.type, torch.bfloat16))
        return stack

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        assert not return_outputs, "the logits are not worth keeping"
        targets = next_tokens(inputs["labels"])
        count = num_items_in_batch
        if count is None:
            count = (targets != IGNORED).sum()
        elif self.args.average_tokens_across_devices:
            # Gradients are averaged over processes, the count is the sum over them.
            count = count / self.accelerator.num_processes
        teacher = self._teacher_logits(inputs) if self.kl_weight else None
        logits = _logits(model, inputs)
        return distillation_loss(logits, teacher, targets, kl_weight=self.kl_weight, count=count)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._must_be_finite(loss.item(), "training loss")
        return loss

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """(nothing, sums ``[B, 3]`` of `token_losses` over each row, predicted tokens ``[B]``)"""
        inputs = self._prepare_inputs(inputs)
        targets = next_tokens(inputs["labels"])
        with self.compute_loss_context_manager():
            teacher = self._teacher_logits(inputs)
            losses = token_losses(_logits(model, inputs), teacher, targets)
        return None, losses.sum(1), (targets != IGNORED).sum(1)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found = super().evaluate(*args, **kwargs)
        # Before anything is saved: a checkpoint follows its evaluation.
        self._must_be_finite(found["eval_loss"], "loss on held-out text")
        return found

    @torch.no_grad()
    def _teacher_logits(self, inputs: dict[str, Tensor]) -> Tensor | None:
        return None if self.teacher is None else _logits(self.teacher, inputs)

    def _must_be_finite(self, loss: float, what: str) -> None:
        if not math.isfinite(loss):
            raise Diverged(
                f"the {what} is {loss} at step {self.state.global_step + 1} of "
                f"{self.state.max_steps}: nothing of it was saved; lower --learning-rate, or use "
                "float32 (--precision float32)"
            )


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """``[B, S, V]``; documents are told apart by where their positions begin."""
    out = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], **NO_CACHE)
    logits: Tensor = out.logits
    return logits


def metrics_of(kl_weight: float) -> Any:
    """What the Trainer calls after an evaluation: means over all predicted tokens."""

    def metrics(found: EvalPrediction) -> dict[str, float]:
        sums: Any = found.predictions
        counts: Any = found.label_ids
        kl, ce, source = (float(x) for x in sums.astype("float64").sum(0) / counts.sum())
        loss = (1 - kl_weight) * ce + (kl_weight * kl if kl_weight else 0.0)
        return {"loss": loss, "ce": ce, "ppl": _exp(ce)} | (
            {} if math.isnan(source) else {"kl": kl, "source_ppl": _exp(source)}
        )

    return metrics


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
