"""The values that "auto" stands for on this machine: --amp and --compile."""

from argparse import Namespace

import torch

from engine.runtime.distributed import Processes
from engine.runtime.precision import AMP_DTYPES, amp_of, fastest_dtype
from models import ExitNetwork
from settings.conflicts import conflict_of_compiling

# Compile only above this many forward operations per process; below it, compiling costs more than it saves.
COMPILING_PAYS = 5e12


def resolve_auto(
    settings: Namespace,
    processes: Processes,
    network: ExitNetwork,
    image_size: int,
    operations: int,
    *,
    operations_per_process: float = 0.0,
    compile_speedup_share: float = 1.0,
) -> Namespace:
    """Return the settings with --amp auto and --compile auto resolved.

    All processes decide together about --amp: they may run on unlike machines, or measure differently.

    Args:
        settings: The settings of the run.
        processes: The processes that share the run.
        network: The network to train or evaluate.
        image_size: Height and width of the images in pixels.
        operations: Operations of the network per image.
        operations_per_process: Forward operations per epoch and process.
        compile_speedup_share: The share of them that compiling makes faster on a CPU.
    """
    amp, compile_mode = settings.amp, settings.compile
    if amp == "auto":
        choices = (*AMP_DTYPES, "off")
        batch_size = settings.batch_size // processes.world_size
        measured = (network, image_size, operations, batch_size, settings.evalmode is None)
        own = amp_of(fastest_dtype(processes.device, *measured))
        amp = choices[processes.all_reduce_max(choices.index(own))]
    if compile_mode == "auto":
        on_gpu = torch.cuda.is_available()
        # A small network keeps a GPU waiting for its kernels to start, also where it is frozen.
        share = 1.0 if on_gpu else compile_speedup_share
        is_long = settings.epochs * operations_per_process * share > COMPILING_PAYS
        # Synchronised batch normalisation leaves little to compile: every such layer ends a graph.
        is_long = is_long and not (settings.sync_bn and processes.world_size > 1)
        modes = []
        if is_long:
            modes = ["reduce-overhead", "default"] if on_gpu else ["default"]
        compile_mode = next(
            (mode for mode in modes if not compiling_conflict(mode, settings, processes)), "off"
        )
    return with_values(settings, amp=amp, compile=compile_mode)


def compiling_conflict(mode: str, settings: Namespace, processes: Processes) -> str | None:
    """Return why a mode of --compile does not go together with the other settings, None if it does."""
    return conflict_of_compiling(
        mode,
        settings.checkpoint_activations,
        settings.accumulate,
        num_gpus=len(processes.gpu_ids),
        images_per_process=settings.batch_size // processes.world_size,
    )


def with_values(settings: Namespace, **values: object) -> Namespace:
    """Return a copy of ``settings`` with other values."""
    return Namespace(**{**vars(settings), **values})
