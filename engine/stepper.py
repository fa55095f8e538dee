"""One optimisation step: mixed precision, accumulation over micro-batches, several devices.

Example:
    stepper = Stepper(objective, settings, processes)
    stepper.step(images, targets, learning_rate, meters.update)

An objective is a module ``(images, targets) -> (losses (N,), logits (N, K, C))`` with an ``ExitNetwork`` as
``network``. Only its parameters with ``requires_grad`` are trained.
"""

import logging
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn.parallel import DataParallel, DistributedDataParallel

from engine.runtime.device import keep_freed_memory
from engine.runtime.distributed import Processes
from engine.runtime.precision import amp_dtype
from models.module_state import frozen_statistics


def make_optimizer(objective: nn.Module, settings: Namespace) -> torch.optim.Optimizer:
    """Build the optimiser of the parameters that require a gradient.

    Pretrained parameters form a second group, whose learning rate is multiplied by ``lr_factor``.

    Args:
        objective: Objective whose ``network`` knows its pretrained parameters.
        settings: Settings with optimizer, lr, momentum, nesterov, weight_decay, fused_optimizer and
            pretrained_lr_factor.
    """
    pretrained = {id(p) for p in objective.network.pretrained_parameters()}
    trained = [p for p in objective.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in pretrained], "lr_factor": 1.0},
        {"params": [p for p in trained if id(p) in pretrained], "lr_factor": settings.pretrained_lr_factor},
    ]
    groups = [group for group in groups if group["params"]]
    # ``fused``: one kernel updates all weights. The optimiser runs outside the compiled step, so a new
    # learning rate needs no new CUDA graph. ``Stepper.step`` sets it at every step; the constructors only
    # require some value.
    common = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused": settings.fused_optimizer}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, **common)
    return torch.optim.SGD(groups, **common, momentum=settings.momentum, nesterov=settings.nesterov)


def synchronise_batch_norm(objective: nn.Module) -> None:
    """Make every BatchNorm inside, in place, normalise by the batch of all processes."""
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    if any(type(module).__name__ == "BatchNormAct2d" for module in objective.modules()):
        # PyTorch's conversion would drop the activations inside timm's layers. timm is optional.
        from timm.layers import convert_sync_batchnorm as convert
    convert(objective)


class Stepper:
    """Optimisation of ``objective``, step by step, with SGD or AdamW.

    Args:
        objective: The objective, on its device.
        settings: Settings of ``make_optimizer``, and clip_grad, amp, accumulate, compile and sync_bn, that
            ``settings.conflicts.conflict_on_machine`` accepts.
        processes: This process and the others.
    """

    def __init__(self, objective: nn.Module, settings: Namespace, processes: Processes):
        self.settings, self.processes = settings, processes
        if processes.device.type == "cpu":
            keep_freed_memory()
        self.dtype = amp_dtype(settings)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=self.dtype is torch.float16)
        if settings.sync_bn and processes.world_size > 1:
            synchronise_batch_norm(objective)
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(objective, settings)
        self.was_skipped = False
        self.objective = objective
        self._autocast: _Autocast | None = None  # the module that ``_model`` wraps to exchange gradients
        self._model: nn.Module | None = None

    @property
    def learning_rate(self) -> float:
        """Largest learning rate of the last step; that of pretrained parameters may be smaller."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    @property
    def is_prepared(self) -> bool:
        """Whether ``prepare`` was called."""
        return self._model is not None

    def prepare(self, images: Tensor, targets: Tensor) -> None:
        """Compile the step for batches such as this one, if the settings ask for it.

        Compiling runs forward and backward on the batch; weights, statistics and random state stay as they
        are, and only SyncBatchNorm waits for other processes. With several processes or GPUs, parameters that
        no exit depends on are excluded from training: ``DistributedDataParallel`` would wait for their
        gradients, and ``DataParallel`` would give them zeros.

        Args:
            images: (N, 3, H, W).
            targets: (N,).
        """
        if self.processes.world_size > 1 or len(self.processes.gpu_ids) > 1:
            self._exclude_unused_parameters(images[:2], targets[:2])
        self._autocast = _Autocast(
            _compiled(self.objective, self.settings), self.processes.device, self.dtype
        )
        self._model = _parallel(self._autocast, self.processes)
        if self.settings.compile != "off":
            size = len(images) // self.settings.accumulate
            self._run_without_step(images[:size], targets[:size])

    def train_eagerly(self) -> None:
        """Take all further steps without the compiled code."""
        self._autocast.objective = self.objective

    def _exclude_unused_parameters(self, images: Tensor, targets: Tensor) -> None:
        """Exclude parameters that no exit depends on, such as finer scales of the last layer."""
        eager = _Autocast(self.objective, self.processes.device, self.dtype)
        for parameter in _parameters_without_gradient(eager, self.parameters, images, targets):
            parameter.requires_grad_(False)

    def _run_without_step(self, images: Tensor, targets: Tensor) -> None:
        """Run forward and backward, which compiles them, and discard everything they change."""
        buffers = [(buffer, buffer.clone()) for buffer in self.objective.buffers()]
        devices = [images.device] if images.device.type == "cuda" else []
        is_shared = isinstance(self._model, DistributedDataParallel)
        try:
            with torch.random.fork_rng(devices), self._model.no_sync() if is_shared else nullcontext():
                losses, _ = self._model(images, targets)
                losses.sum().backward()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            for buffer, before in buffers:
                buffer.copy_(before)

    def step(
        self,
        images: Tensor,
        targets: Tensor,
        learning_rate: float,
        observe: Callable[[Tensor, Tensor, Tensor], None],
    ) -> None:
        """Take a step on this process's share of a batch, without waiting for the device (except in fp16).

        With ``accumulate``, gradients are summed over micro-batches, weighted by their sizes: the gradient is
        that of the mean loss over the whole batch. BatchNorm normalises each micro-batch by itself.

        Args:
            images: (N, 3, H, W).
            targets: (N,).
            learning_rate: Learning rate of this step; ``lr_factor`` of a parameter group multiplies it.
            observe: Called with losses (n,), logits (n, K, C) and targets (n,) of every micro-batch.
        """
        if not self.is_prepared:
            self.prepare(images, targets)
        model = self._model
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_factor", 1.0)
        count = self.settings.accumulate
        micro_batches = zip(images.tensor_split(count), targets.tensor_split(count), strict=True)
        for i, (micro_images, micro_targets) in enumerate(micro_batches, start=1):
            # Processes exchange gradients once, with the last micro-batch.
            defers_exchange = i < count and isinstance(model, DistributedDataParallel)
            with model.no_sync() if defers_exchange else nullcontext():
                losses, logits = model(micro_images, micro_targets)
                self.scaler.scale(losses.sum() / len(targets)).backward()
            # At once: the next micro-batch may use the memory of a compiled graph's results.
            observe(losses.detach(), logits.detach(), micro_targets)
        if self.settings.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_grad)
        scale, is_first = self.scaler.get_scale(), not self.optimizer.state
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.was_skipped = self.scaler.get_scale() < scale
        if self.was_skipped and is_first:
            # Fused SGD makes buffers for the momentum even if it then writes nothing into them.
            self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: ``optimizer`` and ``scaler``."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the entries that ``state_dict`` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run did not need one before
            self.scaler.load_state_dict(state["scaler"])


class _Autocast(nn.Module):
    """The objective under autocast; inside the module, as DataParallel's threads do not inherit it."""

    def __init__(self, objective: nn.Module, device: torch.device, dtype: torch.dtype | None):
        super().__init__()
        self.objective, self.device, self.dtype = objective, device, dtype

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            return self.objective(images, targets)


def _compiled(objective: nn.Module, settings: Namespace) -> nn.Module:
    if settings.compile == "off":
        return objective
    # By default AOTAutograd caches no graph with a custom autograd.Function, such as that of Gradient
    # Equilibrium, as its result could depend on global state. Ours depends on its arguments alone. The
    # environment variable of this setting would have to be set before anything in the process compiles.
    if hasattr(functorch_config, "autograd_cache_allow_custom_autograd_functions"):
        functorch_config.autograd_cache_allow_custom_autograd_functions = True
    # One graph, as with one process. By default Dynamo splits it at the buckets of DistributedDataParallel,
    # and such parts are not cached. In older versions they also wrote into memory that other parts still
    # needed (pytorch#160745), and CUDA graphs were recorded again and again (pytorch#140395).
    torch._dynamo.config.optimize_ddp = False
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # hide that there is no GPU
    return torch.compile(objective, mode=None if settings.compile == "default" else settings.compile)


def _parameters_without_gradient(
    objective: nn.Module, parameters: list[Tensor], images: Tensor, targets: Tensor
) -> list[Tensor]:
    devices = [images.device] if images.device.type == "cuda" else []
    with frozen_statistics(objective), torch.random.fork_rng(devices):
        losses, _ = objective(images, targets)
        # Inside: autograd refuses buffers that were put back after the forward pass read them.
        gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
    return [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is None]


def _parallel(objective: nn.Module, processes: Processes) -> nn.Module:
    if processes.world_size > 1:
        # Harmless: the weight of a 1x1 convolution is contiguous and channels-last at once.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        model = DistributedDataParallel(objective, device_ids=list(processes.gpu_ids) or None)
        # Training does not read running statistics;
        # ``Processes.share_buffers`` shares them before they are read.
        model.broadcast_buffers = False
        return model
    if len(processes.gpu_ids) > 1:
        return DataParallel(objective, device_ids=list(processes.gpu_ids))
    return objective
