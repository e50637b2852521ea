"""Exchange weights with the other sites whenever a round ends: a mixin for any trainer.

What the weights are at each moment of epoch e:

    validated, logged, checkpoint_best    the site's own weights after its iterations of epoch e
    sent                                  the same, of the tensors that the sites share
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
    memory ran out, losses or weights are     with the error, whose kind is reported; no weights are sent, and --c goes
    NaN, an epoch was cut short, ...          on from the last aggregate

With several processes (DDP) the first one talks to the coordinator, and the others get from it what it gets.

Method: Skorupko et al., Scientific Reports 15:38312 (2025), AsymFedAvg; weighted by the number of training cases.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from nnunetv2.federated import messages
from nnunetv2.federated.bodies import FederationSettings
from nnunetv2.federated.client import FederationClient
from nnunetv2.federated.errors import BrokenTrainingError, FederationError
from nnunetv2.federated.session import RunSession, Weights
from nnunetv2.federated.site import SiteCredential, load_credential
from nnunetv2.training.nnUNetTrainer.variants.federated.aggregate_validation import (
    describe_validation,
    validate_network,
)
from nnunetv2.training.nnUNetTrainer.variants.federated.first_process import FirstProcessError, ask_first_process
from nnunetv2.training.nnUNetTrainer.variants.federated.health import check_epoch, kind_of
from nnunetv2.training.nnUNetTrainer.variants.federated.network_weights import (
    copy_from_first_process_,
    export_weights,
    import_weights_,
)
from nnunetv2.training.nnUNetTrainer.variants.federated.registration import describe_match, describe_training

METRICS = ("train_losses", "val_losses", "mean_fg_dice", "dice_per_class_or_region")
Rest = TypeVar("Rest")


class FederatedTraining:
    """Mixin: put it before a trainer class. Everything but the end of an epoch stays that trainer's own."""

    requires_equal_plans = False
    """Whether a site with other plans is refused, or shares what matches."""

    staleness = 0
    """How many epochs the site trains on while a round is exchanged."""

    credential: SiteCredential | None = None
    """Who this site is; None: whoever the credential of this machine says."""

    make_transport: Callable[..., FederationClient] = FederationClient
    """How to reach the coordinator; a test or another engine puts its own here."""

    round_in_training: int | None = None
    """The round whose update is being made; None before it is known."""

    received_megabytes = 0.0
    """Size of the weights that came last."""

    # ---------------------------------------------------------------- the frame
    def run_training(self) -> None:
        """Train as a member of the federation that this site has joined; report to it if the training fails."""
        credential = self.credential or load_credential()
        run = messages.run_name(self.configuration_name, self.fold, type(self).__name__)
        # Every process can report its own failure; for all else only the first one uses its connection.
        with self.make_transport(credential, report=self.print_to_log_file) as transport:
            self.session = RunSession(transport, site=credential.site, run=run)
            try:
                super().run_training()
            except FirstProcessError:
                raise  # which has reported it
            except BaseException as error:
                # The text of an error may quote paths or case names; only its kind leaves the site.
                self.session.report_failure(self.round_in_training, kind_of(error))
                raise

    def on_train_start(self) -> None:
        """Take over the settings of the run, register, and load the weights that all sites start from."""
        self.apply_settings(ask_first_process(lambda: self.session.transport.settings()))
        super().on_train_start()
        match = ask_first_process(lambda: self.session.register(self.describe_training()))
        for line in describe_match(match, self.session.site):
            self.tell(line, add_timestamp=False)
        own = self.own_weights()
        position = self.receive_weights(lambda: self._start(own))
        self.go_on_at(position["epoch"])
        if position["is_over"]:
            self.tell(f"Run {self.session.run} is over after {self.current_epoch} rounds: ending with its aggregate")
            self.end_here()

    def on_train_epoch_start(self) -> None:
        """Note which round is in the making."""
        self.round_in_training = self.current_epoch
        super().on_train_epoch_start()

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Let only whole epochs with finite losses become updates."""
        check_epoch(train_outputs, epoch=self.current_epoch, num_iterations=self.num_iterations_per_epoch)
        super().on_train_epoch_end(train_outputs)

    def on_epoch_end(self) -> None:
        """Let the trainer end its epoch, then exchange, then save what came back."""
        epoch = self.current_epoch  # super() moves on to the next one
        super().on_epoch_end()
        try:
            self.meet_the_others(epoch)
        except FederationError as error:
            if not isinstance(error, BrokenTrainingError):
                self.save_latest_checkpoint()
                self.tell("The training is saved in checkpoint_latest: --c goes on with it")
            raise

    def _save_epoch_checkpoints(self, epoch: int) -> None:
        """Save checkpoint_best only: checkpoint_latest waits for what the exchange brings."""
        self._save_checkpoint_if_best()

    # ---------------------------------------------------------------- before the first round
    def apply_settings(self, settings: FederationSettings) -> None:
        """Use the epochs and iterations that the federation has fixed for all its sites."""
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
            self.network, plans=self.plans_manager.plans, dataset_json=self.dataset_json, fold=self.fold,
            configuration=self.configuration_name, trainer=type(self).__name__,
            num_training_cases=len(self.do_split()[0]), mirroring_axes=self.inference_allowed_mirroring_axes,
            requires_equal_plans=self.requires_equal_plans)

    def _start(self, own: Weights) -> tuple[Weights, dict]:
        position = self.session.start(self.current_epoch, own, staleness=self.staleness)
        return position.weights, {"epoch": position.epoch, "is_over": position.is_over}

    # ---------------------------------------------------------------- rounds
    def meet_the_others(self, epoch: int) -> None:
        """Exchange the weights of an epoch that is over, save what came back, and validate it."""
        aggregate = self.exchange_weights(epoch)
        if self.current_epoch < self.num_epochs:
            self.save_latest_checkpoint()
        self.validate_aggregate(aggregate, is_last=self.current_epoch >= self.num_epochs)

    def exchange_weights(self, epoch: int) -> messages.Aggregate:
        """Send the weights of this site, and go on with the aggregate, wherever the run is."""
        start = time.monotonic()
        own, metrics = self.own_weights(), self.latest_metrics()
        aggregate = self.receive_weights(lambda: self.session.exchange(epoch, own, metrics))
        self.report_round(aggregate, seconds=time.monotonic() - start)
        self.go_on_after(aggregate, epoch)
        return aggregate

    def go_on_after(self, aggregate: messages.Aggregate, epoch: int) -> None:
        """Move to the epoch after an aggregate, or end, if the operator has stopped the run before round `epoch`."""
        if aggregate.round < epoch:
            self.tell(f"The operator has stopped run {self.session.run} after round {aggregate.round}: ending with "
                      "its aggregate")
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
    def latest_metrics(self) -> Mapping[str, object]:
        """Return the figures of the last epoch that travel with its update."""
        return {name: self.logger.get_value(name, step=-1) for name in METRICS}

    def report_round(self, aggregate: messages.Aggregate, *, seconds: float) -> None:
        """Log what a round moved, how long it took and who took part."""
        missing = f"; missing: {', '.join(aggregate.missing)}" if aggregate.missing else ""
        self.tell(f"Round {aggregate.round}: {self.received_megabytes:.1f} MB each way, {seconds:.1f} s; "
                  f"sites: {', '.join(sorted(aggregate.contributors))}{missing}")

    def tell(self, line: str, **options: bool) -> None:
        """Log a line, once per site."""
        if self.local_rank == 0:
            self.print_to_log_file(line, **options)
