"""AsymFedAvg with differential privacy for each patient of a site."""

from __future__ import annotations

from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.messages import PrivacyDeclaration
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.federated.federated_training import FederatedTraining
from nnunetv2.training.nnUNetTrainer.variants.privacy.private_training import PrivateTraining


class PrivateFederatedTraining(FederatedTraining, PrivateTraining):
    """Mixin: both together, so that differential privacy covers the updates.

    Losses, Dice and counts of validated voxels stay at the site.
    """

    refused_options = {**PrivateTraining.refused_options, **FederatedTraining.refused_options}

    sends_figures = False
    sends_before_validation = True
    example_of_privacy = PrivacyDeclaration(
        unit="patient",
        epsilon=8.123456789012345,
        delta=0.0001234567890123456,
        sigma=1.234567890123456,
        lot=64,
        clip=1.0,
        steps=100_000,
        accountant="dp-accounting 0.6.0, PLD",
        uncovered=("plans",),
    )

    def run_training(self) -> None:
        """Train as a member of the federation, if the training can be private."""
        self.check_privacy()
        super().run_training()

    def apply_settings(self, settings: FederationSettings) -> None:
        """Use the settings of the federation; refuse epochs that no budget is for.

        Raises:
            FederationError: The sites are to train on after the last round.
        """
        if settings.finetune_epochs:
            raise FederationError(
                f"--finetune-epochs {settings.finetune_epochs} does not go with {type(self).__name__}: the privacy "
                "budget is spent when the last round is over. Found a federation without it"
            )
        super().apply_settings(settings)

    def declare_privacy(self) -> PrivacyDeclaration:
        """Return the promise of this training to its patients."""
        return PrivacyDeclaration.model_validate(self.describe_privacy())


class nnUNetTrainerDPAsymFedAvg(PrivateFederatedTraining, nnUNetTrainer):
    """Average the parameters in common (AsymFedAvg), with differential privacy for each patient."""
