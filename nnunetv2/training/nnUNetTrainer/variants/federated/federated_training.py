"""Exchange weights with the other sites whenever a round ends: a mixin for any trainer.

What the weights are at each moment of epoch e:

    validated, logged, checkpoint_best    the site's own weights after its iterations of epoch e
    sent                                  the same, of the tensors that the sites share
    checkpoint_latest, checkpoint_final,  the aggregate of round e where tensors are shared, the site's own elsewhere
    trained in epoch e + 1

Optimizer state, learning rate and augmentation stay at the site. The last epoch ends with an exchange too, so
checkpoint_final holds the aggregate.

Method: Skorupko et al., Scientific Reports 15:38312 (2025), AsymFedAvg; weighted by the number of training cases.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from nnunetv2.federated import matching, messages
from nnunetv2.federated.bodies import FederationSettings
from nnunetv2.federated.client import FederationClient
from nnunetv2.federated.session import RunSession
from nnunetv2.federated.site import load_credential
from nnunetv2.training.networks import bare_network

METRICS = ("train_losses", "val_losses", "mean_fg_dice", "dice_per_class_or_region")


def export_weights(network: torch.nn.Module) -> dict[str, np.ndarray]:
    """Copy every distinct floating-point tensor of the network: first of its names -> float32 array."""
    distinct, _ = matching.distinct_tensors(bare_network(network).state_dict())
    return {name: tensor.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format).numpy()
            for name, tensor in distinct.items() if tensor.is_floating_point()}


@torch.no_grad()
def import_weights_(network: torch.nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Write weights into the network in place; aliases of a tensor share its memory and follow."""
    state = bare_network(network).state_dict()
    for name, values in weights.items():
        state[name].copy_(torch.from_numpy(np.array(values)))


def describe_match(match: messages.Match, site: str) -> list[str]:
    """Say in a few lines what this site shares with whom."""
    shared, total = match.coverage[site]
    lines = [f"Shared, matched by {match.rule}: {shared:,} of {total:,} parameters ({shared / total:.1%})"]
    partners: dict[tuple[str, ...], int] = {}
    for sites in match.shared.values():
        if site in sites:
            partners[tuple(sorted(sites))] = partners.get(tuple(sorted(sites)), 0) + 1
    lines += [f"  {count} tensors with {', '.join(name for name in names if name != site)}"
              for names, count in sorted(partners.items(), key=lambda item: -item[1])]
    weights = ", ".join(f"{name} {weight:g}" for name, weight in sorted(match.weights.items()))
    return [*lines, f"Weights of the sites ({match.weighting}): {weights}"]


class FederatedTraining:
    """Mixin: put it before a trainer class. Everything but the end of an epoch stays that trainer's own."""

    requires_equal_plans = False
    """Whether a site with other plans is refused, or shares what matches."""

    make_transport: Callable[..., FederationClient] = FederationClient
    """How to reach the coordinator; a test or another engine puts its own here."""

    def run_training(self) -> None:
        """Train as a member of the federation that this site has joined; report to it if the training fails."""
        if self.is_ddp:
            raise ValueError(f"{type(self).__name__} trains on one device per site: start it without -num_gpus")
        credential = load_credential()
        run = messages.run_name(self.configuration_name, self.fold, type(self).__name__)
        with self.make_transport(credential, report=self.print_to_log_file) as transport:
            self.session = RunSession(transport, site=credential.site, run=run)
            try:
                super().run_training()
            except BaseException as error:
                # The text of an error may quote paths or case names; only its kind leaves the site.
                self.session.report_failure(self.current_epoch, type(error).__name__)
                raise

    def on_train_start(self) -> None:
        """Take over the settings of the run, register, and load the weights that all sites start from."""
        self.apply_settings(self.session.transport.settings())
        super().on_train_start()
        match = self.session.register(self.describe_training())
        for line in describe_match(match, self.session.site):
            self.print_to_log_file(line, add_timestamp=False)
        position = self.session.start(self.current_epoch, export_weights(self.network))
        import_weights_(self.network, position.weights)
        self.go_on_at(position.epoch)

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
        """Say what this site trains: plans, labels, number of training cases, and the tensors of its network."""
        distinct, aliases = matching.distinct_tensors(bare_network(self.network).state_dict())
        axes = self.inference_allowed_mirroring_axes
        known = messages.TrainingData.model_fields
        description = {key: value for key, value in self.dataset_json.items() if key in known}
        description.setdefault("channel_names", self.dataset_json.get("modality"))  # the name in old datasets
        return messages.Registration(
            configuration=self.configuration_name, fold=str(self.fold), trainer=type(self).__name__,
            num_training_cases=len(self.do_split()[0]), plans=self.plans_manager.plans,
            dataset_json=messages.TrainingData(**description), requires_equal_plans=self.requires_equal_plans,
            mirroring_axes=None if axes is None else tuple(axes),
            tensors=tuple(matching.describe_tensors(distinct)), aliases=aliases)

    def go_on_at(self, epoch: int) -> None:
        """Move to the epoch at which the run is; the curves show epochs that were missed as gaps."""
        if epoch == self.current_epoch:
            return
        self.print_to_log_file(f"The run is at round {epoch}, this site at epoch {self.current_epoch}: going on there")
        now = time.time()
        for name, values in self.logger.local_logger.my_fantastic_logging.items():
            gap = now if name.endswith("timestamps") else float("nan")
            values.extend([[gap] if name == "dice_per_class_or_region" else gap] * (epoch - len(values)))
        self.current_epoch = epoch

    def _save_epoch_checkpoints(self, epoch: int) -> None:
        """Save checkpoint_best only: checkpoint_latest waits for what the exchange brings."""
        self._save_checkpoint_if_best()

    def on_epoch_end(self) -> None:
        """Let the trainer end its epoch, then exchange, then save what came back."""
        epoch = self.current_epoch  # super() moves on to the next one
        super().on_epoch_end()
        start = time.monotonic()
        metrics = {name: self.logger.get_value(name, step=-1) for name in METRICS}
        weights, aggregate = self.session.exchange(epoch, export_weights(self.network), metrics)
        import_weights_(self.network, weights)
        self.report_round(aggregate, weights, seconds=time.monotonic() - start)
        # A site that was so late that the run went on without it gets a later aggregate.
        self.go_on_at(max(self.current_epoch, aggregate.round + 1))
        if self.current_epoch < self.num_epochs:
            self.save_latest_checkpoint()

    def report_round(self, aggregate: messages.Aggregate, weights: Mapping[str, np.ndarray], *, seconds: float) -> None:
        """Log what a round moved, how long it took and who took part."""
        megabytes = sum(values.nbytes for values in weights.values()) / 1e6
        missing = f"; missing: {', '.join(aggregate.missing)}" if aggregate.missing else ""
        self.print_to_log_file(f"Round {aggregate.round}: {megabytes:.1f} MB each way, {seconds:.1f} s; "
                               f"sites: {', '.join(sorted(aggregate.contributors))}{missing}")
