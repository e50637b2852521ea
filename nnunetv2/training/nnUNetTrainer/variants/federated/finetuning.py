"""Train on alone from the common model, after the last round: the operator's `--finetune-epochs`.

The learning rates are the last ones of the run's schedule once more. The result is a checkpoint of its own,
checkpoint_finetuned.pth; the network is the common model again afterwards, as in checkpoint_final.pth. An
interrupted site begins again from there, and ends with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.models.checkpoint_file import CheckpointError, load_checkpoint_file
from nnunetv2.models.networks import bare_network
from nnunetv2.training.distributed import from_first_process

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

FINETUNED = "checkpoint_finetuned.pth"


class ShiftedSchedule:
    """A schedule of learning rates that counts epochs from elsewhere.

    Args:
        schedule: Whose `step(epoch)` sets the learning rate.
        shift: Added to the epoch.
    """

    def __init__(self, schedule: Any, shift: int) -> None:
        self.schedule = schedule
        self.shift = shift

    def step(self, epoch: int) -> None:
        """Set the learning rate of an epoch."""
        self.schedule.step(epoch + self.shift)


def finetune_(trainer: nnUNetTrainer, num_epochs: int, *, planned_epochs: int, log_line: Callable[[str], None]) -> None:
    """Train at this site alone, save the result, and return to the common model.

    Args:
        trainer: At the end of its run; its hooks exchange nothing meanwhile.
        planned_epochs: Length of the schedule of the run, which the operator may have ended earlier.
    """
    last_round = trainer.current_epoch
    if from_first_process(lambda: _is_done(trainer, num_epochs)):
        log_line(f"{FINETUNED} is there already: this site was fine-tuned for {num_epochs} epochs")
        return
    log_line(f"Fine-tuning at this site alone for {num_epochs} epochs, into {FINETUNED}")
    common = {name: tensor.clone() for name, tensor in bare_network(trainer.network).state_dict().items()}
    schedule = trainer.lr_scheduler
    trainer.lr_scheduler = ShiftedSchedule(schedule, max(0, planned_epochs - num_epochs) - last_round)
    trainer.num_epochs = last_round + num_epochs
    try:
        trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
        while trainer.current_epoch < trainer.num_epochs:
            trainer._run_epoch()
        trainer.save_checkpoint_between_epochs(FINETUNED)
        trainer.logger.local_logger.wait_for_plot()
    finally:
        trainer._progress.clear()
        trainer._shut_down_dataloaders()
        trainer._writer.wait()
        trainer.lr_scheduler = schedule
        trainer.num_epochs = trainer.current_epoch = last_round
        bare_network(trainer.network).load_state_dict(common)
    trainer._writer.raise_failure()
    log_line(f"Fine-tuning done: nnUNetv2_predict ... -chk {FINETUNED} uses it")


def _is_done(trainer: nnUNetTrainer, num_epochs: int) -> bool:
    """Tell whether the result is there, and of this very training, as the times of its epochs show."""
    try:
        found = load_checkpoint_file(Path(trainer.output_folder, FINETUNED), mmap=True)
        moments = found["logging"]["epoch_end_timestamps"]
    except (FileNotFoundError, CheckpointError, KeyError):
        return False
    rounds = trainer.current_epoch
    own = trainer.logger.get_value("epoch_end_timestamps", step=None)
    return found["current_epoch"] == rounds + num_epochs and moments[:rounds] == own[:rounds]
