"""Exchange weights with the other sites whenever a round ends: a mixin for any trainer.

    this thread     train e | validate own_e            | load, save | validate aggregate_e | train e + 1
    another one             | send own_e .. aggregate_e |              (every so many rounds)

Weights are final when the iterations of their epoch are over, so they travel while the site validates them. Nobody
trains on anything older for that. But what the validation finds is known only when the update has left: it travels with
the next one. The last round has no next one and is sent after its validation.

What the weights are at each moment of epoch e:

    sent                                  the site's own weights, as the trainer's `on_train_epoch_end` leaves them, of
                                          the tensors that the sites share
    validated, logged, checkpoint_best    the same, of all tensors
    checkpoint_latest, checkpoint_final,  the aggregate of round e where tensors are shared, the site's own elsewhere
    trained in epoch e + 1
    validated for the federation          the same; the voxels that were counted are sent, and a line of the log tells
                                          of them. The curves and checkpoint_best stay the site's own; the best
                                          aggregate, by the data of all sites, is chosen and kept by the coordinator

Optimizer state, learning rate and augmentation stay at the site. The last epoch ends with an exchange too, so
checkpoint_final holds the aggregate.

How a training ends:

    all rounds are closed, or the operator    in order, with checkpoint_final
    has stopped the run
    the coordinator was away for too long,    with the error; checkpoint_latest holds the site's own weights, and --c
    or refuses                                goes on where the run is
    memory ran out, losses or weights are     with the error, whose kind is reported; --c goes on from the last average.
    NaN, an epoch was cut short, ...          Weights of the epoch are sent only if it was its validation that failed
    SIGTERM                                   by the signal, as ever; a site of one process reports it first

With several processes (DDP) the first one talks to the coordinator, and the others get from it what it gets.

Method: Skorupko et al., Scientific Reports 15:38312 (2025), AsymFedAvg; weighted by the number of training cases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

from nnunetv2.federated.errors import BrokenTrainingError, FederationError
from nnunetv2.federated.privacy.min_cases import check_enough_cases
from nnunetv2.federated.protocol import keys, messages
from nnunetv2.federated.protocol.api import LEAST_SITES, FederationSettings
from nnunetv2.federated.protocol.document import file_digest
from nnunetv2.federated.site.credential import SiteCredential, load_credential
from nnunetv2.federated.site.participant import RunSession, Weights
from nnunetv2.federated.site.transports.http import FederationClient
from nnunetv2.training.distributed import is_distributed
from nnunetv2.training.folder_lock import FolderInUseError
from nnunetv2.training.nnUNetTrainer.variants.federated.aggregate_validation import (
    describe_validation,
    validate_network,
)
from nnunetv2.training.nnUNetTrainer.variants.federated.health import check_epoch, kind_of
from nnunetv2.training.nnUNetTrainer.variants.federated.network_weights import (
    copy_from_first_process_,
    export_weights,
    import_weights_,
)
from nnunetv2.training.nnUNetTrainer.variants.federated.rank_zero import FirstProcessError, ask_first_process, in_thread
from nnunetv2.training.nnUNetTrainer.variants.federated.registration import describe_match, describe_training
from nnunetv2.training.nnUNetTrainer.variants.federated.termination import before_termination

METRICS_OF_TRAINING = ("train_losses",)
METRICS_OF_VALIDATION = ("val_losses", "mean_fg_dice", "dice_per_class_or_region")
METRICS = (*METRICS_OF_TRAINING, *METRICS_OF_VALIDATION)
"""Curves whose values travel, epoch by epoch."""
Rest = TypeVar("Rest")


class FederatedTraining:
    """Mixin: put it before a trainer class. Everything but the end of an epoch stays that trainer's own."""

    requires_equal_plans = False
    """Whether a site with other plans is refused, or shares what matches."""

    staleness = 0
    """How many epochs the site trains on while a round is exchanged."""

    sends_before_validation = True
    """Whether an update leaves before its weights are validated, and the metrics of that with the next one."""

    leaves_checkpoint_files_alone = True

    pretrained_weights: str | None = None
    """Checkpoint that the network of this site starts from. All sites of a run give the same, or none."""

    credential: SiteCredential | None = None
    """Who this site is; None: whoever the credential of this machine says."""

    make_transport: Callable[..., FederationClient] = FederationClient
    """How to reach the coordinator; a test or another engine puts its own here."""

    round_in_training: int | None = None
    """The round whose update is being made; None before it is known."""

    sent_round: int | None = None
    """The round whose exchange is under way."""
    _sent: Weights = {}
    _exchange: Future[tuple[Weights, messages.Aggregate]] | None = None
    """What was sent, and the exchange itself; in the first process only."""

    min_sites = LEAST_SITES
    """Over so many sites, at least, everything is averaged, as the coordinator has promised."""

    received_megabytes = 0.0
    """Size of the weights that came last."""

    # ---------------------------------------------------------------- the frame
    def run_training(self) -> None:
        """Train as a member of the federation that this site has joined; report to it if the training fails.

        Raises:
            NotAllowedError: The fold has fewer training cases than the site wants to take part with; nothing was sent.
        """
        credential = self.credential or load_credential()
        check_enough_cases(len(self.do_split()[0]), f"fold {self.fold} of {self.plans_manager.dataset_name}")
        run = keys.run_name(self.configuration_name, self.fold, type(self).__name__)
        # Every process can report its own failure; for all else only the first one uses its connection.
        with self.make_transport(credential, report=self.print_to_log_file) as transport:
            self.session = RunSession(transport, site=credential.site, run=run)
            # What ends one of several processes may be the failure of another one, which has reported that.
            speaks_last = (
                nullcontext()
                if is_distributed()
                else before_termination(lambda: self.session.report_failure(self.round_in_training, "terminated"))
            )
            try:
                with speaks_last:
                    super().run_training()
            except (FirstProcessError, FolderInUseError):
                raise  # which has been reported, or is no failure of the training that goes on there
            except BaseException as error:
                # The text of an error may quote paths or case names; only its kind leaves the site.
                self.session.report_failure(self.round_in_training, kind_of(error))
                raise

    def on_train_start(self) -> None:
        """Take over the settings of the run, register, and load the weights that all sites start from."""
        self.apply_settings(ask_first_process(lambda: self.session.transport.settings()))
        super().on_train_start()
        match, self.session.run, outlook = ask_first_process(self._register)
        for line in (*describe_match(match, self.session.site), outlook):
            self.tell(line, add_timestamp=False)
        own = self.own_weights()
        position = self.receive_weights(lambda: self._start(own))
        self.tell(self._describe_start(begins=position["begins"]))
        self.go_on_at(position["epoch"])
        if position["is_over"]:
            self.tell(f"Run {self.session.run} is over after {self.current_epoch} rounds: ending with its aggregate")
            self.end_here()

    def on_train_epoch_start(self) -> None:
        """Note which round is in the making."""
        self.round_in_training = self.current_epoch
        super().on_train_epoch_start()

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Let only whole epochs with finite losses become updates, and send them."""
        check_epoch(train_outputs, epoch=self.current_epoch, num_iterations=self.num_iterations_per_epoch)
        super().on_train_epoch_end(train_outputs)
        self.send_before_validation(self.current_epoch)

    def on_epoch_end(self) -> None:
        """Let the trainer end its epoch, then take over what the exchange has brought, and save it."""
        epoch = self.current_epoch  # super() moves on to the next one
        super().on_epoch_end()
        try:
            self.meet_the_others(epoch)
        except FederationError as error:
            if not isinstance(error, BrokenTrainingError):
                self.save_latest_checkpoint()
                self.tell("The training is saved in checkpoint_latest: --c goes on with it")
            raise

    def save_while_training(self) -> None:
        """Save checkpoint_latest while the training goes on."""
        with self._writing_in_background():
            self.save_latest_checkpoint()

    def _save_epoch_checkpoints(self, epoch: int) -> None:
        """Save checkpoint_best only: checkpoint_latest waits for what the exchange brings."""
        self._save_checkpoint_if_best()

    # ---------------------------------------------------------------- before the first round
    def apply_settings(self, settings: FederationSettings) -> None:
        """Use the epochs and iterations that the federation has fixed for all its sites."""
        self.min_sites = settings.min_sites
        self.tell(f"Nothing is averaged over fewer than {self.min_sites} sites")
        epochs_before = self.num_epochs
        self.num_epochs = settings.num_epochs or self.num_epochs
        self.num_iterations_per_epoch = settings.num_iterations_per_epoch or self.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = settings.num_val_iterations_per_epoch or self.num_val_iterations_per_epoch
        if self.was_initialized and self.num_epochs != epochs_before:
            # A resumed trainer has built its schedule already, for another number of epochs.
            state = self.optimizer.state_dict()
            self.optimizer, self.lr_scheduler = self.configure_optimizers()
            self.optimizer.load_state_dict(state)

    def describe_training(self) -> messages.Registration:
        """Say what this site trains."""
        return describe_training(
            self.network,
            plans=self.plans_manager.plans,
            dataset_json=self.dataset_json,
            fold=self.fold,
            configuration=self.configuration_name,
            trainer=type(self),
            num_training_cases=len(self.do_split()[0]),
            mirroring_axes=self.inference_allowed_mirroring_axes,
            requires_equal_plans=self.requires_equal_plans,
            pretrained_weights=None if self.pretrained_weights is None else file_digest(Path(self.pretrained_weights)),
        )

    def _register(self) -> tuple[messages.Match, str, str]:
        """Return what is shared, the name of the run, and a line on what will become of its averages."""
        match = self.session.register(self.describe_training())
        return match, self.session.run, self.session.describe_outlook()

    def _start(self, own: Weights) -> tuple[Weights, dict]:
        position = self.session.start(self.current_epoch, own, staleness=self.staleness)
        return position.weights, {"epoch": position.epoch, "is_over": position.is_over, "begins": position.begins}

    def _describe_start(self, *, begins: bool) -> str:
        """Say what this site starts from, and that weights it was given are of no use, where they are not."""
        weights = self.pretrained_weights
        if not begins:
            unused = f"; -pretrained_weights {weights} are not used" if weights else ""
            return f"The run has begun: going on from its weights{unused}"
        if weights is None:
            return "All sites start from the initial weights"
        return (
            f"All sites start from the same pretrained weights, {weights}; the layers that output classes are "
            "those of the site named above"
        )

    # ---------------------------------------------------------------- rounds
    def send_before_validation(self, epoch: int) -> None:
        """Begin the exchange of an epoch whose iterations are over, unless it is the last one."""
        if self.sends_before_validation and epoch + 1 < self.num_epochs:
            self.begin_exchange(epoch, self.make_update(epoch, METRICS_OF_TRAINING))

    def meet_the_others(self, epoch: int) -> None:
        """Take over what the exchange of an epoch that is over brings, save that, and validate it."""
        if self.sent_round is None:
            self.begin_exchange(epoch, self.make_update(epoch, METRICS))
        aggregate = self.finish_exchange()
        self.go_on_after(aggregate, epoch)
        if self.current_epoch < self.num_epochs:
            self.save_while_training()
        self.validate_aggregate(aggregate, is_last=self.current_epoch >= self.num_epochs)

    def begin_exchange(self, number: int, update: messages.Update) -> None:
        """Send the weights as they are now; a thread waits for what becomes of them."""
        self.sent_round = number
        if self.local_rank == 0:
            own = self._sent = self.own_weights()
            self._exchange = in_thread(lambda: self.session.exchange(number, own, update), name="exchange")

    def finish_exchange(self) -> messages.Aggregate:
        """Wait for the exchange that is under way, load the aggregate, and return what is said of it."""
        start = time.monotonic()
        aggregate = self.receive_weights(lambda: self._exchange.result())
        self.report_round(aggregate, waited_s=time.monotonic() - start)
        self.sent_round, self._sent, self._exchange = None, {}, None
        return aggregate

    def go_on_after(self, aggregate: messages.Aggregate, epoch: int) -> None:
        """Move to the epoch after an aggregate, or end, if the operator has stopped the run before round `epoch`."""
        if aggregate.round < epoch:
            self.tell(
                f"The operator has stopped run {self.session.run} after round {aggregate.round}: ending with "
                "its aggregate"
            )
            self.end_here()
        else:
            # A site that was so late that the run went on without it gets a later aggregate.
            self.go_on_at(max(self.current_epoch, aggregate.round + 1))

    def validate_aggregate(self, aggregate: messages.Aggregate, *, is_last: bool) -> None:
        """Count how well the aggregate that the network holds does on this site's validation data, and say so."""
        if not ask_first_process(lambda: self.session.wants_validation(aggregate, is_last=is_last)):
            return
        found = validate_network(self)
        if found is None:
            self.tell("The aggregate is not validated: the validation steps of this trainer count no voxels")
            return
        problem = ask_first_process(lambda: self.session.send_validation(aggregate.round, found))
        self.tell(describe_validation(aggregate.round, found) + (f" (not sent: {problem})" if problem else ""))

    def go_on_at(self, epoch: int) -> None:
        """Move to the epoch at which the run is; the curves show epochs that were missed as gaps."""
        if epoch == self.current_epoch:
            return
        self.tell(f"The run is at round {epoch}, this site at epoch {self.current_epoch}: going on there")
        now = time.time()
        for name, values in self.logger.local_logger.my_fantastic_logging.items():
            gap = now if name.endswith("timestamps") else float("nan")
            values.extend([[gap] if name == "dice_per_class_or_region" else gap] * (epoch - len(values)))
        self.current_epoch = epoch

    def end_here(self) -> None:
        """Let no further epoch begin."""
        self.num_epochs = self.current_epoch

    # ---------------------------------------------------------------- weights
    def own_weights(self) -> Weights:
        """Return a copy of the network's weights, in the first process; the others need none."""
        return export_weights(self.network) if self.local_rank == 0 else {}

    def receive_weights(self, question: Callable[[], tuple[Weights, Rest]]) -> Rest:
        """Ask for weights in the first process, load them in all, and return what came with them."""
        received: Weights = {}

        def ask() -> Rest:
            nonlocal received
            received, rest = question()
            return rest

        rest = ask_first_process(ask)
        self.load_weights(received)
        self.received_megabytes = sum(values.nbytes for values in received.values()) / 1e6
        return rest

    def load_weights(self, weights: Weights) -> None:
        """Load weights that the first process has into the networks of all processes."""
        import_weights_(self.network, weights)
        copy_from_first_process_(self.network)

    # ---------------------------------------------------------------- reports
    def make_update(self, epoch: int, known: Sequence[str]) -> messages.Update:
        """Return what travels with the weights of an epoch: metrics of it, and those that the update before lacked."""
        earlier = None
        if self.sends_before_validation and epoch > 0:
            earlier = messages.EarlierMetrics(
                round=epoch - 1, metrics=self.metrics_of(epoch - 1, METRICS_OF_VALIDATION)
            )
        return messages.Update(metrics=self.metrics_of(epoch, known), earlier=earlier)

    def metrics_of(self, epoch: int, names: Sequence[str]) -> Mapping[str, object]:
        """Return what the curves of these names have of an epoch; a trainer without validation has no curve of it."""
        curves = {name: self.logger.get_value(name, step=None) for name in names}
        return {name: values[epoch] for name, values in curves.items() if epoch < len(values)}

    def report_round(self, aggregate: messages.Aggregate, *, waited_s: float) -> None:
        """Log what a round moved, how long the site did nothing but wait for it, and who took part."""
        missing = f"; missing: {', '.join(aggregate.missing)}" if aggregate.missing else ""
        self.tell(
            f"Round {aggregate.round}: {self.received_megabytes:.1f} MB each way, waited {waited_s:.1f} s; "
            f"sites: {', '.join(sorted(aggregate.contributors))}{missing}"
        )
        if len(aggregate.contributors) < self.min_sites:
            self.tell(
                f"These are fewer than {self.min_sites} sites: the coordinator's version does not know "
                "--min-sites, or it does not keep to it. Show this line to the coordinating site"
            )

    def tell(self, line: str, **options: bool) -> None:
        """Log a line, once per site."""
        if self.local_rank == 0:
            self.print_to_log_file(line, **options)
