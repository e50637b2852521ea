"""Train with differential privacy for each patient: a mixin for trainers.

It works with and without a federation. Every step draws a lot of patients, takes the gradient of each of them by a
backward pass of its own, clips it, sums, adds noise, and divides by the size of a lot on average. The noise follows
from the budget of the site, which is charged before every epoch (`federated/privacy/ledger.py`). All that becomes of
the noisy gradients afterwards, momentum, averages and models among it, tells no more of a patient.

Figures that tell more stay where they are: losses and Dice of training and validation are lines of the log; the curves,
which go into checkpoints, pictures and to loggers, have gaps in their place. There is no checkpoint_best, which would
be chosen by them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nnunetv2.federated.privacy.accounting import accountant_name, epsilon_of
from nnunetv2.federated.privacy.ledger import LEDGER_FILE, Charge, Ledger, LedgerError, charge, read_ledger
from nnunetv2.paths import nnUNet_raw
from nnunetv2.preprocessed_data.patients_file import PATIENTS_FILE, find_separated
from nnunetv2.training import steps
from nnunetv2.training.data_augmentation.augmenters import build_augmenters
from nnunetv2.training.data_pipeline import build_loaders
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.differential_privacy import patients as patient_lists
from nnunetv2.training.differential_privacy import refusals
from nnunetv2.training.differential_privacy.gradients import ClippedSum
from nnunetv2.training.differential_privacy.lots import LotStream, PatientLoader, PoissonSampler, secret_generator
from nnunetv2.training.differential_privacy.options import PrivacyOptions
from nnunetv2.training.differential_privacy.patients import Patients
from nnunetv2.training.differential_privacy.plan import PrivacyPlan, make_plan
from nnunetv2.training.differential_privacy.refusals import RECORD_FILE
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.optimization import build_sgd
from nnunetv2.training.seeding import SEED_VARIABLE, seed_from_environment
from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.json_files import read_json

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as _Trainer
else:
    _Trainer = object  # the mixin stands before a trainer class of the user's choice

MOMENTUM = 0.9


class PrivateTraining(_Trainer):
    """Mixin for trainers: put it before the trainer's class, and after that of a federation."""

    leaves_checkpoint_files_alone = True

    refused_options: Mapping[str, str] = {
        "early_stopping": "an end that depends on figures of patients tells of them, and epsilon does not cover it",
        "batch_size": "it draws lots of patients instead of batches, --dp_lot sets their size",
        "seed": "noise that somebody can repeat hides nothing",
    }

    privacy_options = PrivacyOptions()
    """The options of the user."""

    patients: Patients
    privacy_plan: PrivacyPlan
    are_plans_uncovered = False
    """Whether the plans were made from the patients that are protected."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.num_epochs, self.num_iterations_per_epoch = 100, 25
        self.oversample_foreground_percent, self.probabilistic_oversampling = 1 / 3, True
        self.grad_scaler = None
        self.save_every = 1  # an epoch that is lost is paid for all the same
        self._has_to_draw_examples = False  # pictures of patients have no place in a model's folder
        self._generator = secret_generator()
        self._clipped_sum: ClippedSum | None = None
        self._is_checked = False
        self._planned_head, self._planned_epochs = "", 0
        """The head of the ledger, and the number of epochs to come, that the plan is known to fit."""
        self._latest_loss = 0.0
        self._measured: dict[str, Any] = {}

    # ---------------------------------------------------------------------------------------------- before training
    def initialize(self) -> None:
        """Build network, optimizer, schedule and loss; refuse networks that mix patients."""
        refusals.check_process(is_ddp=self.is_ddp, has_grad_scaler=self.grad_scaler is not None)
        super().initialize()
        refusals.check_network(self.network)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Return SGD with a constant rate, and less momentum than without noise."""
        optimizer = build_sgd(
            self.network,
            initial_lr=self.initial_lr,
            weight_decay=self.weight_decay,
            device=self.device,
            momentum=MOMENTUM,
        )
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, exponent=0.0)

    def check_privacy(self) -> None:
        """Find the patients to protect; refuse trainings that cannot protect them.

        Raises:
            PrivacyRefusedError: Patients are too few, or something else than the training tells of them.
            LedgerError: The ledger is not whole.
        """
        if self._is_checked:
            return
        accountant_name()  # first of all: it says so where the library is missing
        refusals.check_process(is_ddp=self.is_ddp, has_grad_scaler=self.grad_scaler is not None)
        self.privacy_options = self._options()
        if self.is_cascaded:
            refusals.check_previous_stage(Path(self._require(self.folder_with_segs_from_previous_stage)))
        training, validation = self.do_split()
        folder = Path(self._require(self.preprocessed_dataset_folder_base))
        raw = Path(nnUNet_raw) / folder.name if nnUNet_raw.is_set() else None
        patient_of = patient_lists.read_patients(folder, raw)
        self.patients = patient_lists.group_by_patient(training, patient_of)
        refusals.check_number(len(self.patients), self.patients.unit, self.fold)
        self._compare_units(read_ledger(self.ledger_file))
        self.are_plans_uncovered = refusals.check_plans(
            self.plans_manager.plans, _fingerprints(folder), may_leak="plans" in self.privacy_options.uncovered
        )
        self._check_earlier_trainings()
        self._report_privacy(patient_of, training, validation)
        self._is_checked = True

    def on_train_start(self) -> None:
        """Plan the noise of all epochs, then start as usual."""
        if not self.was_initialized:
            self.initialize()
        self.check_privacy()
        self.plan_privacy()
        self._clipped_sum = ClippedSum(self.network.parameters(), clip_norm=self.privacy_plan.clip)
        super().on_train_start()

    @property
    def ledger_file(self) -> Path:
        """Return where the site keeps account of this dataset."""
        return Path(self._require(self.preprocessed_dataset_folder_base), LEDGER_FILE)

    @property
    def _run_name(self) -> str:
        return f"{Path(self._require(self.output_folder_base)).name}/fold_{self.fold}"

    def plan_privacy(self) -> None:
        """Find the noise with which the epochs to come fit into the budget.

        Raises:
            BudgetError: They do not; the message has a plan that does.
        """
        ledger = read_ledger(self.ledger_file)
        self.privacy_plan = make_plan(
            self.privacy_options,
            ledger,
            num_patients=len(self.patients),
            epochs=max(0, self.num_epochs - self.current_epoch),
            steps=self.num_iterations_per_epoch,
            training=f"{self.configuration_name} fold {self.fold}",
            sigma_before=next((one.sigma for one in reversed(ledger.charges) if one.run == self._run_name), None)
            if self.current_epoch
            else None,
        )
        self._planned_head, self._planned_epochs = ledger.head, self.privacy_plan.epochs
        self.print_to_log_file(f"Differential privacy per {self.patients.unit}: {self.privacy_plan.describe()}")

    # ---------------------------------------------------------------------------------------------------- epochs
    def on_train_epoch_start(self) -> None:
        """Charge the epoch, on the disk, before anything of it happens."""
        self._charge_epoch()
        super().on_train_epoch_start()

    def train_step(self, batch: dict) -> dict:
        """Learn from a lot, `{"patients": batches}`, and return the mean loss of its patients.

        An empty lot takes a step of noise, and has the loss of the one before.
        """
        assert self._clipped_sum is not None
        losses = []
        for one in batch["patients"]:
            data, target = steps.move_batch(one, self.device)
            loss = self._forward(data, target)[1]
            self._clipped_sum.add(loss)
            losses.append(float(loss.detach()))
        self._clipped_sum.release_(sigma=self.privacy_plan.sigma, lot=self.privacy_plan.lot, generator=self._generator)
        self.optimizer.step()
        known = [loss for loss in losses if np.isfinite(loss)]
        self._latest_loss = float(np.mean(known)) if known else self._latest_loss
        return {"loss": np.float64(self._latest_loss)}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Keep the mean training loss for the log only."""
        self._measured["train_loss"] = float(np.mean([output["loss"] for output in train_outputs]))
        super().on_train_epoch_end(_without_values(train_outputs))

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Keep the validation loss and the Dice for the log only."""
        collated = collate_outputs(val_outputs)
        tp, fp, fn = (np.asarray(collated[name], np.float64).sum(axis=0) for name in ("tp_hard", "fp_hard", "fn_hard"))
        self._measured["val_loss"] = float(np.mean(collated["loss"]))
        self._measured["pseudo_dice"] = [float(dice) for dice in steps.dice_from_counts(tp, fp, fn)]
        super().on_validation_epoch_end(_without_values(val_outputs))

    def on_train_end(self) -> None:
        """Report the privacy that is spent by now."""
        super().on_train_end()
        if self._planned_head:
            ledger = read_ledger(self.ledger_file)
            spent = epsilon_of(ledger.spent, self.privacy_plan.delta)
            self._write_record(ledger, spent=spent)
            self.print_to_log_file(
                f"All trainings of this dataset have spent epsilon {spent:.4g} of {self.privacy_plan.limit:g} per "
                f"{self.patients.unit}, delta {self.privacy_plan.delta:g}"
            )

    def _report_epoch(self) -> None:
        dice = [round(value, 4) for value in self._measured["pseudo_dice"]]
        self.print_to_log_file("train_loss", round(self._measured["train_loss"], 4))
        self.print_to_log_file("val_loss", round(self._measured["val_loss"], 4))
        self.print_to_log_file("Pseudo dice", dice)
        times = [self.logger.get_value(f"epoch_{what}_timestamps", step=-1) for what in ("start", "end")]
        self.print_to_log_file(f"Epoch time: {times[1] - times[0]:.2f} s")

    def _save_checkpoint_if_best(self) -> None:
        """Do nothing: which epoch is best on patients tells of them."""

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the context of forward passes: bfloat16 on CUDA, where the default is float16."""
        if self.device.type != "cuda":
            return super()._autocast()
        if not torch.cuda.is_bf16_supported():
            return contextlib.nullcontext()
        return torch.autocast("cuda", dtype=torch.bfloat16)

    # ------------------------------------------------------------------------------------------------------- data
    def get_dataloaders(self) -> tuple[Iterator[Any], Iterator[dict]]:
        """Return endless lots of training patients, and batches of validation data; their workers are running."""
        training, validation = build_loaders(self, training_class=PatientLoader, validation_class=nnUNetDataLoader)
        training.cases_of, training.patches = self.patients.cases_of, self.privacy_plan.patches
        num_workers = get_allowed_n_proc_DA()
        sampler = PoissonSampler(
            list(self.patients.cases_of), rate=self.privacy_plan.rate, generator=secret_generator()
        )
        lots = LotStream(sampler, training, num_workers=num_workers)
        lots.start()
        pin_memory = self.device.type == "cuda"
        batches = build_augmenters(training, validation, num_processes=num_workers, pin_memory=pin_memory)[1]
        if hasattr(batches, "start"):
            batches.start()
        return lots, batches

    def _shut_down_dataloaders(self) -> None:
        if isinstance(self.dataloader_train, LotStream):
            self.dataloader_train.close()
        super()._shut_down_dataloaders()

    # ----------------------------------------------------------------------------------------------------- account
    def describe_privacy(self) -> dict[str, Any]:
        """Return the promise of this training, as plain data; its epsilon holds at every moment."""
        plan = self.privacy_plan
        return {
            "unit": self.patients.unit,
            "epsilon": plan.limit,
            "delta": plan.delta,
            "sigma": plan.sigma,
            "lot": plan.lot,
            "clip": plan.clip,
            "steps": plan.steps * self.num_epochs,
            "accountant": accountant_name(),
            "uncovered": ["plans"] if self.are_plans_uncovered else [],
        }

    def _charge_epoch(self) -> None:
        is_as_planned = read_ledger(self.ledger_file).head == self._planned_head
        if not is_as_planned or self.num_epochs - self.current_epoch > self._planned_epochs:
            self.plan_privacy()  # another training has charged the ledger, or an epoch is trained again
        plan = self.privacy_plan
        ledger = charge(
            self.ledger_file,
            Charge(
                run=self._run_name,
                epoch=self.current_epoch,
                rate=plan.rate,
                sigma=plan.sigma,
                steps=plan.steps,
                clip=plan.clip,
                lot=plan.lot,
                patients=len(self.patients),
                unit=self.patients.unit,
                delta=plan.delta,
            ),
            at_most=plan.limit,
            checked_head=self._planned_head,
        )
        self._planned_head, self._planned_epochs = ledger.head, self._planned_epochs - 1
        self._write_record(ledger)

    def _write_record(self, ledger: Ledger, *, spent: float | None = None) -> None:
        """Write the promise beside the checkpoints, and which ledger keeps account of it."""
        record = {
            **self.describe_privacy(),
            **({} if spent is None else {"epsilon_spent": spent}),
            "patients": len(self.patients),
            "patches": self.privacy_plan.patches,
            "epochs_charged": sum(one.run == self._run_name for one in ledger.charges),
            "ledger": {"lines": len(ledger.lines), "head": ledger.head},
            "options": asdict(replace(self.privacy_options, epsilon=self.privacy_plan.limit)),
        }
        save_json_atomically(record, self._in_output_folder(RECORD_FILE), sort_keys=False)

    def _options(self) -> PrivacyOptions:
        """Return the options given now, or when this training began."""
        record = Path(self._require(self.output_folder), RECORD_FILE)
        if self.current_epoch == 0 or not record.is_file():
            return self.privacy_options
        return self.privacy_options.otherwise(PrivacyOptions.of_json(read_json(record).get("options", {})))

    def _compare_units(self, ledger: Ledger) -> None:
        earlier = {one.unit for one in ledger.charges} - {self.patients.unit}
        if earlier and not self.patients.are_scans:
            raise LedgerError(
                f"{ledger.path} has charged per {earlier.pop()}, and this training would per {self.patients.unit}, "
                "which do not add up: "
                + (
                    f"put {PATIENTS_FILE} back"
                    if self.patients.unit == "scan"
                    else f"train without {PATIENTS_FILE}, and all records say that the unit is a scan"
                )
            )

    def _check_earlier_trainings(self) -> None:
        """Raise LedgerError if a training of this dataset was charged to a ledger that had more lines."""
        ledger = read_ledger(self.ledger_file)
        for record in sorted(Path(self._require(self.output_folder_base)).parent.glob(f"*/fold_*/{RECORD_FILE}")):
            head = read_json(record).get("ledger", {}).get("head")
            if isinstance(head, str) and not ledger.has_head(head):
                raise LedgerError(
                    f"{ledger.path} lacks charges that {record} tells of: it was replaced, or restored from an old "
                    "backup. Nothing is trained; restore the file with all its lines"
                )

    def _report_privacy(self, patient_of: dict[str, str] | None, training: list[str], validation: list[str]) -> None:
        if patient_of is None:
            self.print_to_log_file(
                f"There is no {PATIENTS_FILE}: each scan counts as a patient of its own. A patient with "
                "several scans is protected less than epsilon says, and all records say that the unit is a scan"
            )
        elif self.fold != "all" and (both := find_separated([{"train": training, "val": validation}], patient_of)):
            self.print_to_log_file(
                f"{len(both)} patients have scans for training and for validation, such as {both[0].patient}: "
                "validation scores will be too good (nnUNetv2_make_splits keeps patients whole)"
            )
        self.print_to_log_file(
            "The plans are not covered by epsilon: they were made from the same patients"
            if self.are_plans_uncovered
            else "The plans are taken for those of other patients: no fingerprint here is theirs"
        )
        if seed_from_environment() is not None:
            self.print_to_log_file(
                f"{SEED_VARIABLE} has no effect on lots and noise: who knew the seed could take the noise away"
            )
        for twin in patient_lists.datasets_with_the_same_cases(self.ledger_file):
            self.print_to_log_file(
                f"WARNING: {twin} has the same cases, and a ledger of its own: what was spent there is not counted "
                "here, and both add up for the patients"
            )


def _without_values(outputs: list[dict]) -> list[dict]:
    """Return results of steps with NaN in the place of every number."""
    return [{name: np.full_like(value, np.nan, dtype=np.float64) for name, value in one.items()} for one in outputs]


def _fingerprints(folder: Path) -> dict[str, dict]:
    found = {name: folder / name for name in refusals.FINGERPRINTS}
    return {name: read_json(file) for name, file in found.items() if file.is_file()}
