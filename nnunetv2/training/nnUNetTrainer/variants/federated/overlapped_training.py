"""Exchange a round while the next one trains (staleness 1).

    epoch       r                r + 1                           r + 2
    training    ....... own_r    ........................ own_r+1  ......
    exchange                     sent_r --> aggregate_r            sent_r+1 --> ...

A round is one epoch, or several with `--exchange-every`. At the end of round r + 1 the site goes on from the aggregate
of round r, plus its own progress since:

    sent_r+1 = aggregate_r + (own_r+1 - sent_r)

The mean of the weights sent is then the mean of the sites' own weights: nothing is counted twice or lost, it only
arrives a round later (Zhu et al., Delayed Gradient Averaging, NeurIPS 2021; Zhou et al., DaSGD, arXiv:2006.00441). The
last round is exchanged as usual, so checkpoint_final holds an aggregate. In between, checkpoint_latest holds sent_r;
--c goes on from the last aggregate, so up to two rounds are trained again.

All sites of a run take part in the same way: the trainer's name is part of the run's.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nnunetv2.training.nnUNetTrainer.variants.federated.federated_training import METRICS, FederatedTraining


def catch_up(
    aggregate: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray], sent: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return aggregate + (own - sent), for the tensors of the aggregate; float32.

    Args:
        aggregate: The average of `sent` and of the weights that the other sites sent.
        own: The weights of this site after a further epoch that began with `sent`.
    """
    return {name: values + (own[name] - sent[name]) for name, values in aggregate.items()}


class OverlappedTraining(FederatedTraining):
    """Mixin: like FederatedTraining, but the site trains on while a round is exchanged."""

    staleness = 1
    sends_before_validation = False
    """The exchange of the round before may take that long."""

    def exchange_weights(self, epoch: int) -> None:
        """Load the last round's aggregate, send this one; wait for the final one."""
        if not self.rounds.is_last_of_round(epoch, self.num_epochs):
            self.save_while_training()
            return
        if self.pending is not None and not self._catch_up():
            return  # the run is over, and the network holds its last aggregate
        epoch = self.current_epoch - 1  # the same, unless the run has gone on without this site
        if self.current_epoch >= self.num_epochs:
            super().exchange_weights(epoch)
        else:
            self.save_while_training()
            self.begin_exchange(self.rounds.of(epoch), self.make_update(epoch, METRICS))

    def _catch_up(self) -> bool:
        """Finish the exchange and catch up; tell whether the run goes on."""
        own, pending = self.local_weights(), self.pending
        aggregate = self.finish_exchange()
        assert pending is not None and aggregate.round is not None
        is_complete = aggregate.round + 1 >= self.rounds.count(self.num_epochs)
        is_over = is_complete or aggregate.round < pending.number
        if is_over:
            self.resume_after(aggregate, self.rounds.first_epoch(pending.number))
        else:
            # One round behind an aggregate, as ever; farther on only if the run went on without this site.
            next_epoch = self.rounds.first_epoch(aggregate.round + 2)
            self.resume_at(max(self.current_epoch, min(next_epoch, self.num_epochs)))
        self.validate_aggregate(aggregate, is_last=is_over)
        if not is_over:
            caught_up = catch_up(pending.answer.result()[0], own, pending.sent) if pending.answer else {}
            self.load_weights(self.without_local(caught_up))
        return not is_over
