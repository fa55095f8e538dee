"""The checkpoint from which a run resumes.

Example:
    checkpoint = checkpoint_to_resume(command, stage.name, directory)      # None: start
    network = network_to_resume(directory, checkpoint)
"""

from typing import TYPE_CHECKING, Any

from engine.checkpoint import load_checkpoint, load_saved, report_damage
from engine.run_directory import RunDirectory
from engine.runtime.distributed import launch_id, torchrun_environment
from engine.runtime.log import Log
from models import ExitNetwork
from models.saved import build_with_weights
from utils import UserError

if TYPE_CHECKING:
    from settings.command_line import CommandLine


def checkpoint_to_resume(
    command: "CommandLine", stage: str, directory: RunDirectory
) -> dict[str, Any] | None:
    """Load the checkpoint to resume from, None to start.

    Raises:
        UserError: The directory holds a run that the command line does not continue.
    """
    if not command.typed.get("resume") and not _is_restart(directory):
        if not command.typed.get("overwrite"):
            directory.refuse_second()
        return None
    if not directory.last.exists():
        # A run that was killed before it saved for the first time has none of these.
        if directory.holds_results():
            raise UserError(
                f"{directory.path} holds results without last.pt, which --resume needs; "
                "--overwrite starts again"
            )
        if torchrun_environment().rank == 0:
            Log(True).line(f"nothing to resume in {directory.path}: starting from scratch")
        return None
    checkpoint = load_checkpoint(directory.last)
    description = checkpoint["description"]
    if description.stage != stage:
        raise UserError(
            f"{directory.last} was written by train_{description.stage}.py; resume with that program"
        )
    command.refuse_changes(description.recipe, description.origin)
    return checkpoint


def network_to_resume(directory: RunDirectory, checkpoint: dict[str, Any]) -> ExitNetwork:
    """Build the network of a checkpoint, with its weights.

    Raises:
        UserError: The checkpoint is damaged, or the file of the best epoch belongs to another run.
    """
    with report_damage(directory.last):
        network = build_with_weights(checkpoint["description"].network, checkpoint["state_dict"])
    # The best epoch is needed at the end; that its file is of another run should be known before.
    if checkpoint["best_epoch"] and load_saved(directory.best).network.config != network.config:
        raise UserError(f"{directory.best} holds another network than {directory.last}")
    return network


def _is_restart(directory: RunDirectory) -> bool:
    """Return True if torchrun starts the processes of this run again after one was lost (--max-restarts)."""
    environment, launch = torchrun_environment(), launch_id()
    may_be = environment.restart_count > 0
    if environment.local_world_size < environment.world_size:
        # Each machine counts its own restarts alone. A finished run is of an earlier launch of this id.
        sessions = directory.sessions()
        may_be = may_be or not (sessions and sessions[-1].get("complete"))
    if not may_be or launch is None or not directory.last.exists():
        return False
    try:
        return load_checkpoint(directory.last).get("launch") == launch
    except UserError:
        if environment.restart_count > 0:  # it may be of this launch, and --overwrite would delete it
            raise
        return False  # --overwrite replaces it, --resume says what is wrong
