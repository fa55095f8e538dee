"""What keeps GPUs waiting, and what several of them need.

Checked without a GPU, by the operations that PyTorch is asked for.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import train_GE
from adaptive_inference import AdaptivePredictor
from engine.runtime import distributed
from engine.runtime.distributed import Processes, process_group
from engine.stepper import Stepper
from engine.trainer import Trainer
from models import MSDNet
from models.options import MSDNET_FIELDS
from settings.command_line import parse
from tests.conftest import TINY_FLAGS
from tests.helpers import logits_of, make_network, quantile_policy


class Operations(TorchDispatchMode):
    """A counter of the operations in its block for which ``wanted(operation, arguments)`` is true."""

    def __init__(self, wanted):
        super().__init__()
        self.wanted, self.number = wanted, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.number += self.wanted(function, arguments)
        return function(*arguments, **(options or {}))


def test_a_step_starts_few_kernels():
    """Waiting for kernels to start is what small networks spend their time on."""
    chosen = parse(
        "GE", ["--preset", "cifar100", "--batch-size", "2", "--amp", "off", "--compile", "off"]
    ).settings()
    options = {name: getattr(chosen, name) for name in MSDNET_FIELDS if name != "small_inputs"}
    objective = train_GE.Stage1Objective(MSDNet(100, **options, small_inputs=True), chosen).train()
    stepper = Stepper(objective, chosen, Processes(0, 1, torch.device("cpu"), ()))
    batch = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])
    stepper.step(*batch, 0.1, lambda *_: None)
    with Operations(
        lambda function, _: not function.is_view and function is not torch.ops.aten.detach.default
    ) as kernels:
        stepper.step(*batch, 0.1, lambda *_: None)
    assert 500 < kernels.number <= 1100


def test_the_weights_are_found_finite_by_one_synchronisation(tmp_path, tiny_demo, monkeypatch):
    """For each of the two checkpoints of an epoch; a GPU is waited for at each."""
    real, synchronisations = (
        Trainer.write_checkpoint,
        Operations(lambda function, _: function is torch.ops.aten._local_scalar_dense.default),
    )

    def write(*arguments):
        with synchronisations:
            real(*arguments)

    monkeypatch.setattr(Trainer, "write_checkpoint", write)
    assert train_GE.main([*TINY_FLAGS, "--save", str(tmp_path / "run")]) == 0
    assert synchronisations.number == 2


def test_a_prediction_writes_no_number_of_the_host_by_index():
    """A GPU would wait for it, once more in each block."""

    def is_host_number(function, arguments):
        return "index_put" in str(function) and arguments[2].dim() == 0

    network, images = make_network(1), torch.randn(40, 3, 32, 32, dtype=torch.float64)
    predictor = AdaptivePredictor(network, quantile_policy(logits_of(network, images), 0.4))
    with Operations(is_host_number) as writes:
        assert len(predictor(images).exits.unique()) == 3
        assert writes.number == 0
        torch.zeros(3)[torch.tensor([1])] = 1
        assert writes.number == 1


def test_a_lost_process_is_waited_for_15_minutes(monkeypatch):
    """Each process on a GPU of its own, and signals and results exchanged without it."""
    launched = {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}
    for name, value in {**launched, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    joined = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: joined.update(device=device))
    monkeypatch.setattr(distributed, "rendezvous", lambda *_: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **rest: joined.update(rest, backend=backend)
    )
    monkeypatch.setattr(distributed, "leave_process_group", lambda: None)
    with process_group(None) as processes:
        assert processes.gpu_ids == (1,)
    assert (joined["device"], joined["backend"]) == (torch.device("cuda", 1), "cpu:gloo,cuda:nccl")
    assert joined["timeout"] == timedelta(minutes=15)
