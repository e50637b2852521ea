"""Exchange weights at the end of every round: a mixin for trainers.

A round is an epoch, or as many as the federation has agreed on.

    this thread     train e | validate own_e            | load, save | validate aggregate_e | train e + 1
    another one             | send own_e .. aggregate_e |              (every so many rounds)

Weights are final when the iterations of their epoch are over, so they travel while the site validates them. Nobody
trains on anything older for that. But the validation's results are known only when the update has left: they travel
with the next one. The last round has no next one and is sent after its validation.

The weights at each moment of epoch e:

    sent                                  the site's own weights, as the trainer's `on_train_epoch_end` leaves them, of
                                          the tensors that the sites share
    validated, logged, checkpoint_best    the same, of all tensors
    checkpoint_latest, checkpoint_final,  the aggregate of round e where tensors are shared, the site's own elsewhere,
    trained in epoch e + 1                and where the operator wants it so (`--keep-local`)
    validated for the federation          the aggregate wherever tensors are shared; the voxels that were counted are
                                          sent, and a line of the log tells of them. The curves and checkpoint_best
                                          stay the site's own; the best aggregate, by the data of all sites, is chosen
                                          and kept by the coordinator

Optimizer state, learning rate and augmentation stay at the site. The last epoch ends with an exchange too, so
checkpoint_final holds the aggregate. Fine-tuning at the site alone may follow, see `finetuning.py`.

Within a round of several epochs (`--exchange-every`) nothing is sent: the site trains on with its own weights, which
are in checkpoint_latest after each epoch, and --c goes on from them.

How a training ends:

    all rounds are closed, or the operator    in order, with checkpoint_final
    has stopped the run
    the coordinator was away for too long,    with the error; checkpoint_latest holds the site's own weights, and --c
    or refuses                                goes on where the run is
    memory ran out, losses or weights are     with the error, whose kind is reported; --c goes on from the last average.
    NaN, an epoch was cut short, ...          Weights of the epoch are sent only if it was its validation that failed
    SIGTERM                                   by the signal, as ever; a site of one process reports it first

With several processes (DDP) the first one talks to the coordinator, and passes the answers to the others.

Method: Skorupko et al., Scientific Reports 15:38312 (2025), AsymFedAvg; weighted by the number of training cases.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from nnunetv2.federated.aggregation.head_rows import whole_names
from nnunetv2.federated.errors import BrokenTrainingError, FederationError
from nnunetv2.federated.privacy.min_cases import check_enough_cases
from nnunetv2.federated.privacy.own_networks import plans_to_register
from nnunetv2.federated.privacy.plans_redaction import without_own_statistics
from nnunetv2.federated.protocol import keys, messages
from nnunetv2.federated.protocol.api import LEAST_SITES, FederationSettings, check_finetuning, describe_methods
from nnunetv2.federated.protocol.document import file_digest
from nnunetv2.federated.protocol.rounds import Rounds
from nnunetv2.federated.site.credential import SiteCredential, load_credential
from nnunetv2.federated.site.participant import Participant, Weights
from nnunetv2.federated.site.transport import Transport, open_transport
from nnunetv2.models.checkpoint_file import load_checkpoint_file
from nnunetv2.models.networks import bare_network
from nnunetv2.preprocessed_data.fingerprint_files import pooled_fingerprint
from nnunetv2.training.distributed import is_distributed
from nnunetv2.training.folder_lock import FolderInUseError
from nnunetv2.training.loss.marginal import over_annotated_classes
from nnunetv2.training.nnUNetTrainer.variants.federated.aggregate_validation import (
    describe_validation,
    validate_network,
)
from nnunetv2.training.nnUNetTrainer.variants.federated.finetuning import finetune_
from nnunetv2.training.nnUNetTrainer.variants.federated.health import check_epoch, kind_of
from nnunetv2.training.nnUNetTrainer.variants.federated.local_tensors import find_local_tensors
from nnunetv2.training.nnUNetTrainer.variants.federated.network_weights import (
    copy_from_first_process_,
    export_weights,
    import_weights_,
)
from nnunetv2.training.nnUNetTrainer.variants.federated.partial_annotation import (
    PartialAnnotation,
    annotation_of,
    check_planned_for,
)
from nnunetv2.training.nnUNetTrainer.variants.federated.proximal import ProximalTerm
from nnunetv2.training.nnUNetTrainer.variants.federated.rank_zero import FirstProcessError, ask_first_process, in_thread
from nnunetv2.training.nnUNetTrainer.variants.federated.registration import describe_match, describe_training
from nnunetv2.training.nnUNetTrainer.variants.federated.renamed_hooks import RenamedHooks
from nnunetv2.training.nnUNetTrainer.variants.federated.settings_of_run import check_against_settings
from nnunetv2.training.nnUNetTrainer.variants.federated.termination import before_termination
from nnunetv2.training.options import OptionError, TrainingOptions
from nnunetv2.training.stopping import was_signalled

RESTS, RESTS_DUE = "federated_rests", "federated_rests_due"
"""Keys of a checkpoint: the rests of rounding, and the round whose update is to bring them."""
METRICS_OF_TRAINING = ("train_losses",)
METRICS_OF_VALIDATION = ("val_losses", "mean_fg_dice", "dice_per_class_or_region")
METRICS = (*METRICS_OF_TRAINING, *METRICS_OF_VALIDATION)
"""Curves whose values travel, epoch by epoch."""
Rest = TypeVar("Rest")


@dataclass(frozen=True)
class PendingExchange:
    """A round whose update was sent, and whose aggregate is not loaded yet."""

    number: int
    sent: Weights = field(default_factory=dict)
    answer: Future[tuple[Weights, messages.Aggregate]] | None = None
    """In the first process only, as is `sent`."""

    def result(self) -> tuple[Weights, messages.Aggregate]:
        """Wait for the aggregate, in the first process."""
        assert self.answer is not None
        return self.answer.result()


class FederatedTraining(RenamedHooks):
    """Mixin for trainers: put it before the trainer's class."""

    requires_equal_plans = False
    """Whether a site with other plans is refused, or shares the tensors that match."""

    example_of_privacy: messages.PrivacyDeclaration | None = None
    """A declaration as this trainer makes them, for previews of the documents that leave."""

    staleness = 0
    """How many epochs the site trains on while a round is exchanged."""

    sends_before_validation = True
    """Whether an update leaves before its weights are validated, and the metrics of that with the next one."""

    sends_figures = True
    """Whether losses and Dice of epochs, and counts of validated voxels, leave the site."""

    leaves_checkpoint_files_alone = True

    trains_partial_labels = True
    """Whether classes that are not annotated here are not taken for background."""

    training_options = TrainingOptions()

    refused_options: Mapping[str, str] = {
        "early_stopping": "a run ends for all its sites at once, by nnUNetv2_fed_coordinator --epochs or when the "
        "operator stops it with nnUNetv2_fed_admin",
        "stop_after_s": "the others would wait for this site; nnUNetv2_fed_leave takes it out of the run",
        "stop": "the others would wait for this site; nnUNetv2_fed_leave takes it out of the run",
        "results_name": "a site takes part in a run once, and knows it by configuration, fold and trainer",
        "freeze": "all sites train the tensors that they share: what one froze, the others would change",
    }

    pretrained_weights: str | None = None
    """Checkpoint that the network of this site starts from. All sites of a run give the same, or none."""

    credential: SiteCredential | None = None
    """The credential of this site; None: that of this machine."""

    make_transport: Callable[..., Transport] = staticmethod(open_transport)
    """Opens the way to the coordinator; a test or another engine puts its own here."""

    participant: Any = None
    """The membership of this site; None before the training begins."""

    rests: Mapping[str, np.ndarray] = {}
    """The rests that rounding has taken from this site's updates, from a checkpoint."""

    rests_due: int | None = None
    """The round whose update is to bring that."""

    rounds = Rounds()
    """The epochs of a round."""

    round_in_training: int | None = None
    """The round whose update is being made; None before it is known."""

    pending: PendingExchange | None = None
    """The exchange under way."""

    proximal_term: ProximalTerm | None = None
    """Keeps the weights near those of the round, where the operator wants that."""

    shared_tensors: frozenset[str] = frozenset()
    """Names in the network's state dict of the tensors that this site shares."""

    keep_local: str | None = None
    """The tensors that sites keep their own of, as the operator has described them."""

    local_tensors: frozenset[str] = frozenset()
    """Those of them that this site shares: they are sent, and their averages are not taken over."""

    initial_weights: str | None = None
    """SHA-256 of the checkpoint that the operator lets all sites start from."""

    finetune_epochs = 0
    """How long this site trains on alone after the last round."""

    planned_epochs = 0
    """Length of the run's schedule, also where the operator has ended the run earlier."""

    is_finetuning = False
    """Whether the rounds are over, and the training stays at this site."""

    annotation: PartialAnnotation | None = None
    """The classes that this site annotates, where sites may annotate different ones."""

    local_averages: Weights = {}
    """The latest averages of these, in the first process only."""

    _has_answered_signal = False

    min_sites = LEAST_SITES
    """Over so many sites, at least, everything is averaged, as the coordinator has promised."""

    is_masked = False
    """Whether this federation masks updates and statistics."""

    networks: messages.Networks = "equal"
    """Whether all sites of this federation plan the same network, or each its own."""

    # ---------------------------------------------------------------- the frame
    def run_training(self) -> None:
        """Train as a member of the federation; report a failure.

        Raises:
            NotAllowedError: The fold has fewer training cases than the site wants to take part with; nothing was sent.
        """
        credential = self.credential or load_credential()
        check_enough_cases(len(self.do_split()[0]), f"fold {self.fold} of {self.plans_manager.dataset_name}")
        run = keys.run_name(self.configuration_name, self.fold, type(self).__name__)
        # Every process can report its own failure; for all else only the first one uses its connection.
        with self.make_transport(credential, report=self.print_to_log_file) as transport:
            self.participant = Participant(
                transport, site=credential.site, run=run, credential=credential, report=self.print_to_log_file
            )
            # The end of one of several processes may come from the failure of another one, which has reported that.
            speaks_last = (
                nullcontext()
                if is_distributed()
                else before_termination(lambda: self.participant.report_failure(self.round_in_training, "terminated"))
            )
            try:
                with speaks_last:
                    super().run_training()
                if self.local_rank == 0:
                    self.participant.finish()
            except (FirstProcessError, FolderInUseError, OptionError):
                raise  # which has been reported, or is no failure of the training
            except BaseException as error:
                # The text of an error may quote paths or case names; only its kind leaves the site.
                self.participant.report_failure(self.round_in_training, kind_of(error))
                raise
        if self.finetune_epochs:  # which concerns nobody else any more
            with self._hold_output_folder(), self._alone():
                finetune_(self, self.finetune_epochs, planned_epochs=self.planned_epochs, log_line=self.log_line)

    def on_train_start(self) -> None:
        """Apply the settings of the run, register, and load the common weights."""
        settings = ask_first_process(lambda: self.participant.transport.settings())
        self.participant.settings = settings
        self.apply_settings(settings)
        super().on_train_start()
        self._begin_with_annotated_classes()
        match, self.participant.run, outlook = ask_first_process(self._register)
        self.shared_tensors = frozenset(
            sites[self.participant.site] for sites in match.shared.values() if self.participant.site in sites
        )
        for line in (*describe_match(match, self.participant.site), outlook):
            self.log_line(line, add_timestamp=False)
        if self.keep_local is not None:
            self.local_tensors = find_local_tensors(self.network, self.keep_local, self.shared_tensors)
            self.log_line(f"This site keeps its own values of {len(self.local_tensors)} shared tensors")
        if self.annotation is not None and self.current_epoch == 0:
            silent = self.annotation.silence_(self.network, match.received_by(self.participant.site).values())
            if silent:
                self.log_line(
                    f"The classes {silent} are not annotated here, and no outputs come of sites that annotate them, "
                    "which are too few or have other layers: the model of this site does not predict them"
                )
        own, goes_on = self.local_weights(), self.current_epoch > 0
        # Who begins, or comes without a checkpoint, has nothing of its own to keep yet.
        position = self.receive_weights(
            lambda: self._start(own), keeps_local=lambda position: goes_on and position["epoch"] > 0
        )
        if position["is_within"]:  # a round, which the average is known of now
            self.load_weights(own)
        self.log_line(self._describe_start(position["epoch"], begins=position["begins"]))
        epoch = min(position["epoch"], self.num_epochs)
        # Epochs of a round that the operator has stopped stay behind a site that has trained them.
        self.resume_at(max(epoch, self.current_epoch) if position["is_over"] else epoch)
        if position["is_over"]:
            rounds = self.rounds.count(epoch)
            self.log_line(f"Run {self.participant.run} is over after {rounds} rounds: ending with its aggregate")
            self.finish_run()

    def _begin_with_annotated_classes(self) -> None:
        """Find this site's annotated classes, and let the loss merge the others."""
        self.annotation = annotation_of(self.network, self.dataset_json)
        if self.annotation is None:
            return
        if self.annotation.hidden:
            self.log_line(
                f"This site annotates the classes {list(self.annotation.annotated)}; to its loss, "
                f"{list(self.annotation.hidden)} and background are one class"
            )
        self.loss = over_annotated_classes(
            self.loss, annotated=self.annotation.annotated, num_outputs=self.annotation.num_outputs, device=self.device
        )

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Score the classes that this site annotates."""
        super().on_validation_epoch_end(self.without_hidden_classes(val_outputs))

    def without_hidden_classes(self, val_outputs: list[dict]) -> list[dict]:
        """Return results of validation steps without counts of classes that are not annotated here."""
        return val_outputs if self.annotation is None else self.annotation.without_hidden(val_outputs)

    def _has_to_stop(self) -> bool:
        """Tell that a site does not stop alone, and answer a signal that asks for it."""
        if was_signalled() and not self._has_answered_signal:
            self._has_answered_signal = True
            self.log_line(f"SIGUSR1 does not stop this training: {self.refused_options['stop']}")
        return False

    def on_train_epoch_start(self) -> None:
        """Note the round in training."""
        if not self.is_finetuning:
            self.round_in_training = self.rounds.of(self.current_epoch)
        super().on_train_epoch_start()
        if self.proximal_term is not None:
            self.proximal_term.attach_(self.optimizer)  # some trainers build another one between epochs

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Let only whole epochs with finite losses become updates, and send them."""
        check_epoch(train_outputs, epoch=self.current_epoch, num_iterations=self.num_iterations_per_epoch)
        super().on_train_epoch_end(train_outputs)
        if not self.is_finetuning:
            self.send_before_validation(self.current_epoch)

    def on_epoch_end(self) -> None:
        """Let the trainer end its epoch, then finish its exchange."""
        epoch = self.current_epoch  # super() moves on to the next one
        super().on_epoch_end()
        if self.is_finetuning:
            return
        try:
            self.exchange_weights(epoch)
        except FederationError as error:
            if not isinstance(error, BrokenTrainingError):
                self.save_latest_checkpoint()
                self.log_line("The training is saved in checkpoint_latest: --c goes on with it")
            raise

    def _describe_state(self) -> dict[str, Any]:
        """Add the rests of rounding in this site's updates, while due."""
        is_due = self.participant is not None and self.current_epoch + 1 < self.num_epochs
        rests, due = self.participant.rests() if is_due else ({}, None)
        state: dict[str, Any] = super()._describe_state()
        if rests:
            state[RESTS] = {name: torch.from_numpy(values) for name, values in rests.items()}
            state[RESTS_DUE] = due
        return state

    def load_checkpoint(self, filename_or_checkpoint: dict | str | os.PathLike[str]) -> None:
        """Go on from a checkpoint, with its unsent rests of rounding."""
        checkpoint = filename_or_checkpoint
        if not isinstance(checkpoint, dict):
            checkpoint = load_checkpoint_file(checkpoint, map_location=self.device)
        self.rests = {name: values.cpu().numpy() for name, values in checkpoint.get(RESTS, {}).items()}
        self.rests_due = checkpoint.get(RESTS_DUE)
        super().load_checkpoint(checkpoint)

    def save_while_training(self) -> None:
        """Save checkpoint_latest while the training goes on."""
        with self._writing_in_background():
            self.save_latest_checkpoint()

    def _save_epoch_checkpoints(self, epoch: int) -> None:
        """Save checkpoint_best only: checkpoint_latest waits for the aggregate."""
        if not self.is_finetuning:
            self._save_checkpoint_if_best()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let epochs be this site's own affair for the block."""
        self.is_finetuning = True
        if self.proximal_term is not None:
            self.proximal_term.release()
        try:
            yield
        finally:
            self.is_finetuning = False

    # ---------------------------------------------------------------- before the first round
    def apply_settings(self, settings: FederationSettings) -> None:
        """Use the epochs, iterations and methods that the federation has fixed for all its sites."""
        self.min_sites, self.rounds = settings.min_sites, Rounds(settings.exchange_every)
        self.log_line(f"Nothing is averaged over fewer than {self.min_sites} sites")
        if self.rounds.epochs > 1:
            self.log_line(f"Weights are exchanged after every {self.rounds.epochs} epochs, which are a round")
        self.is_masked, self.networks = settings.secure is not None, settings.networks
        check_against_settings(self.training_options, settings)
        check_finetuning(settings.model_copy(update={"num_epochs": settings.num_epochs or self.num_epochs}))
        check_planned_for(self.dataset_json, settings.labels, settings.federation)
        for line in describe_methods(settings):
            self.log_line(line)
        self.proximal_term = None if settings.proximal is None else ProximalTerm(settings.proximal)
        self.keep_local, self.finetune_epochs = settings.keep_local, settings.finetune_epochs
        self.initial_weights = settings.initial_weights
        epochs_before = self.num_epochs
        self.num_epochs = self.planned_epochs = settings.num_epochs or self.num_epochs
        self.num_iterations_per_epoch = settings.num_iterations_per_epoch or self.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = settings.num_val_iterations_per_epoch or self.num_val_iterations_per_epoch
        if self.was_initialized and self.num_epochs != epochs_before:
            # A resumed trainer has built its schedule already, for another number of epochs.
            state = self.optimizer.state_dict()
            self.optimizer, self.lr_scheduler = self.configure_optimizers()
            self.optimizer.load_state_dict(state)

    def declare_privacy(self) -> messages.PrivacyDeclaration | None:
        """Return the promise of this training to its patients; None for nothing."""
        return None

    def describe_training(self) -> messages.Registration:
        """Return the registration of this site."""
        return describe_training(
            self.network,
            plans=self._plans_to_register(),
            dataset_json=self.dataset_json,
            fold=self.fold,
            configuration=self.configuration_name,
            trainer=type(self),
            num_training_cases=len(self.do_split()[0]),
            mirroring_axes=self.inference_allowed_mirroring_axes,
            requires_equal_plans=self.requires_equal_plans,
            pretrained_weights=None if self.pretrained_weights is None else file_digest(Path(self.pretrained_weights)),
            privacy=self.declare_privacy(),
        )

    def _plans_to_register(self) -> Mapping[str, Any]:
        """Return the plans as far as the federation needs them.

        Without statistics of this site alone where it masks such; without settings that tell of this site's GPU where
        sites have networks of their own.
        """
        plans: Mapping[str, Any] = self.plans_manager.plans
        if self.is_masked:
            folder = self.preprocessed_dataset_folder_base
            plans = without_own_statistics(plans, None if folder is None else pooled_fingerprint(Path(folder)))
        return plans if self.networks == "equal" else plans_to_register(plans, self.configuration_name)

    def _register(self) -> tuple[messages.Match, str, str]:
        """Register; return the match, the run's name and its outlook."""
        match = self.participant.register(self.describe_training())
        self.participant.take_over(self.rests, self.rests_due)
        return match, self.participant.run, self.participant.describe_outlook()

    def _start(self, own: Weights) -> tuple[Weights, dict]:
        position = self.participant.start(
            self.current_epoch, own, staleness=self.staleness, rounds=self.rounds, num_epochs=self.num_epochs
        )
        return position.weights, {
            "epoch": position.epoch,
            "is_within": position.is_within,
            "is_over": position.is_over,
            "begins": position.begins,
        }

    def _describe_start(self, epoch: int, *, begins: bool) -> str:
        """Describe the initial weights, and whether pretrained ones are used."""
        weights, number = self.pretrained_weights, self.rounds.of(epoch)
        if begins and self.initial_weights is not None:
            return (
                f"All sites start from the weights of the operator, SHA-256 {self.initial_weights}; the layers that "
                "output classes are those of the site named above"
            )
        if epoch > self.rounds.first_epoch(number):
            return f"Going on within round {number} from this site's own weights, at epoch {epoch}"
        if not begins:
            unused = f"; -pretrained_weights {weights} are not used" if weights else ""
            return f"The run has begun: going on from its weights{unused}"
        if weights is None:
            return "All sites start from the initial weights"
        return (
            f"All sites start from the same pretrained weights, {weights}; tensors that start anew are "
            "those of the site named above"
        )

    # ---------------------------------------------------------------- rounds
    def send_before_validation(self, epoch: int) -> None:
        """Begin the exchange of a trained round, unless it is the last."""
        is_last_of_round = self.rounds.is_last_of_round(epoch, self.num_epochs)
        if self.sends_before_validation and is_last_of_round and epoch + 1 < self.num_epochs:
            self.begin_exchange(self.rounds.of(epoch), self.make_update(epoch, METRICS_OF_TRAINING))

    def exchange_weights(self, epoch: int) -> None:
        """Finish the exchange of a round: load the aggregate, save it, validate it.

        Within a round, only save.
        """
        if not self.rounds.is_last_of_round(epoch, self.num_epochs):
            self.save_while_training()
            return
        if self.pending is None:
            self.begin_exchange(self.rounds.of(epoch), self.make_update(epoch, METRICS))
        aggregate = self.finish_exchange()
        self.resume_after(aggregate, epoch)
        if self.current_epoch < self.num_epochs:
            self.save_while_training()
        self.validate_aggregate(aggregate, is_last=self.current_epoch >= self.num_epochs)

    def begin_exchange(self, number: int, update: messages.Update) -> None:
        """Send the weights as they are now; a thread waits for the aggregate."""
        if self.local_rank != 0:
            self.pending = PendingExchange(number)
            return
        sent = self.local_weights()
        answer = in_thread(lambda: self.participant.exchange(number, sent, update), name="exchange")
        self.pending = PendingExchange(number, sent, answer)

    def finish_exchange(self) -> messages.Aggregate:
        """Wait for the pending exchange, load the aggregate, and return its message."""
        start, pending = time.monotonic(), self.pending
        assert pending is not None
        aggregate = self.receive_weights(pending.result, keeps_local=lambda _: True)
        megabytes = self.participant.megabytes if self.local_rank == 0 else 0.0
        self.report_round(aggregate, megabytes=megabytes, waited_s=time.monotonic() - start)
        self.pending = None
        return aggregate

    def resume_after(self, aggregate: messages.Aggregate, epoch: int) -> None:
        """Move to the epoch after an aggregate, or finish a stopped run."""
        assert aggregate.round is not None
        if aggregate.round < self.rounds.of(epoch):
            self.log_line(
                f"The operator has stopped run {self.participant.run} after round {aggregate.round}: ending with "
                "its aggregate"
            )
            self.finish_run()
        else:
            # A site that was so late that the run went on without it gets a later aggregate.
            next_epoch = self.rounds.first_epoch(aggregate.round + 1)
            self.resume_at(max(self.current_epoch, min(next_epoch, self.num_epochs)))

    def validate_aggregate(self, aggregate: messages.Aggregate, *, is_last: bool) -> None:
        """Validate the aggregate on this site's data; log and send the counts."""
        if not self.sends_figures:
            return
        if not ask_first_process(lambda: self.participant.wants_validation(aggregate, is_last=is_last)):
            return
        number = aggregate.round
        assert number is not None  # the initial weights are not wanted
        with self.common_model():
            found = validate_network(self, self.without_hidden_classes)
        if found is None:
            self.log_line("The aggregate is not validated: the validation steps of this trainer count no voxels")
            return
        problem = ask_first_process(lambda: self.participant.send_validation(aggregate, found, is_last=is_last))
        self.log_line(describe_validation(number, found) + (f" (not sent: {problem})" if problem else ""))

    def resume_at(self, epoch: int) -> None:
        """Move to the epoch of the run; the curves show missed epochs as gaps."""
        if epoch == self.current_epoch:
            return
        number = self.rounds.of(epoch)
        self.log_line(f"The run is at round {number}, this site at epoch {self.current_epoch}: going on there")
        now = time.time()
        for name, values in self.logger.local_logger.my_fantastic_logging.items():
            gap = now if name.endswith("timestamps") else float("nan")
            values.extend([[gap] if name == "dice_per_class_or_region" else gap] * (epoch - len(values)))
        self.current_epoch = epoch

    def finish_run(self) -> None:
        """Let no further epoch begin."""
        self.num_epochs = self.current_epoch

    # ---------------------------------------------------------------- weights
    def local_weights(self) -> Weights:
        """Return a copy of the network's weights, in the first process only."""
        if self.local_rank != 0:
            return {}
        weights = export_weights(self.network)
        return weights if self.annotation is None else self.annotation.split(weights)

    def receive_weights(
        self, question: Callable[[], tuple[Weights, Rest]], *, keeps_local: Callable[[Rest], bool]
    ) -> Rest:
        """Receive weights in the first process, load them in all, and return their message.

        Args:
            keeps_local: Tells by the message whether the site goes on with its own values of its local tensors.
        """
        received: Weights = {}

        def ask() -> Rest:
            nonlocal received
            received, rest = question()
            return rest

        rest = ask_first_process(ask)
        self.local_averages = {name: received[name] for name in self.local_tensors & received.keys()}
        self.load_weights(self.without_local(received) if keeps_local(rest) else received)
        if self.proximal_term is not None:
            pulled = whole_names(self.shared_tensors - self.local_tensors)
            self.proximal_term.anchor(
                parameter for name, parameter in bare_network(self.network).named_parameters() if name in pulled
            )
        return rest

    def without_local(self, weights: Weights) -> Weights:
        """Return weights without those that this site keeps its own of."""
        return {name: values for name, values in weights.items() if name not in self.local_tensors}

    @contextmanager
    def common_model(self) -> Iterator[None]:
        """Make the network the common model for the block, local tensors included."""
        if not self.local_tensors:
            yield
            return
        own = {name: values for name, values in self.local_weights().items() if name in self.local_tensors}
        self.load_weights(self.local_averages)
        try:
            yield
        finally:
            self.load_weights(own)

    def load_weights(self, weights: Weights) -> None:
        """Load weights that the first process has into the networks of all processes."""
        whole = weights if self.annotation is None else self.annotation.join(weights, self.network)
        import_weights_(self.network, whole)
        copy_from_first_process_(self.network)

    # ---------------------------------------------------------------- reports
    def make_update(self, epoch: int, known: Sequence[str]) -> messages.Update:
        """Return the metrics of an update, and those that the last lacked."""
        if not self.sends_figures:
            return messages.Update()
        earlier, number = None, self.rounds.of(epoch)
        if self.sends_before_validation and number > 0:
            before = self.rounds.first_epoch(number) - 1
            earlier = messages.EarlierMetrics(round=number - 1, metrics=self.metrics_of(before, METRICS_OF_VALIDATION))
        return messages.Update(metrics=self.metrics_of(epoch, known), earlier=earlier)

    def metrics_of(self, epoch: int, names: Sequence[str]) -> dict[str, messages.Metric]:
        """Return the values of these curves at an epoch, where there are any."""
        curves = {name: self.logger.get_value(name, step=None) for name in names}
        return {name: values[epoch] for name, values in curves.items() if epoch < len(values)}

    def report_round(self, aggregate: messages.Aggregate, *, megabytes: float, waited_s: float) -> None:
        """Log a round: megabytes moved, seconds waited, sites that took part."""
        missing = f"; missing: {', '.join(aggregate.missing)}" if aggregate.missing else ""
        self.log_line(
            f"Round {aggregate.round}: {megabytes:.1f} MB each way, waited {waited_s:.1f} s; "
            f"sites: {', '.join(sorted(aggregate.contributors))}{missing}"
        )
        if not aggregate.contributors:
            self.log_line("The operator has closed this round without any update: going on from the average before")
        elif len(aggregate.contributors) < self.min_sites:
            self.log_line(
                f"These are fewer than {self.min_sites} sites: the coordinator's version does not know "
                "--min-sites, or it does not keep to it. Show this line to the coordinating site"
            )

    def log_line(self, line: str, **options: bool) -> None:
        """Log a line, once per site."""
        if self.local_rank == 0:
            self.print_to_log_file(line, **options)
