"""Trainers for several sites: nnUNetTrainerAsymFedAvg shares matching tensors, nnUNetTrainerFedAvg all of them."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.federated.federated_training import FederatedTraining
from nnunetv2.training.nnUNetTrainer.variants.federated.overlapped_training import OverlappedTraining


class nnUNetTrainerAsymFedAvg(FederatedTraining, nnUNetTrainer):
    """Average the parameters that several sites have in common.

    Parameters that only one site has stay its own (AsymFedAvg).
    """


class nnUNetTrainerFedAvg(FederatedTraining, nnUNetTrainer):
    """Average whole networks (McMahan et al., AISTATS 2017).

    Sites whose plans differ are refused, field by field.
    """

    requires_equal_plans = True

    refused_options = {
        **FederatedTraining.refused_options,
        "batch_size": "all sites of FedAvg train with the batch size of the same plans",
    }


class nnUNetTrainerAsymFedAvgOverlapped(OverlappedTraining, nnUNetTrainer):
    """AsymFedAvg that trains the next epoch while a round is exchanged.

    Every aggregate is used an epoch later.
    """
