"""Build the registration and the metrics of a training from its plans, without training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.privacy.own_networks import plans_to_register
from nnunetv2.federated.privacy.plans_redaction import without_own_statistics
from nnunetv2.federated.protocol.document import file_digest
from nnunetv2.federated.protocol.messages import Networks, Registration
from nnunetv2.models.networks import build_network
from nnunetv2.plans.plans_manager import PlansManager, determine_num_input_channels
from nnunetv2.preprocessed_data.fingerprint_files import pooled_fingerprint
from nnunetv2.training.data_augmentation.default_transforms import rotation_and_patch_size
from nnunetv2.training.nnUNetTrainer.variants.federated.federated_training import (
    METRICS,
    METRICS_OF_VALIDATION,
    FederatedTraining,
)
from nnunetv2.training.nnUNetTrainer.variants.federated.registration import describe_training
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name


@dataclass(frozen=True)
class PlannedTraining:
    """The part of a training that is known before it begins."""

    registration: Registration
    metrics: tuple[str, ...]
    """Names of the figures of an epoch that travel with its update."""
    later_metrics: tuple[str, ...]
    """Names of those that travel with the update of the next epoch."""
    num_classes: int | None
    """Foreground classes or regions, whose voxels are counted in a validation; None if that is not sent."""


def dry_run(
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    *,
    configuration: str,
    trainer_name: str,
    num_cases: int,
    pretrained_weights: Path | None = None,
    masked_in: Path | None = None,
    networks: Networks = "equal",
) -> PlannedTraining:
    """Build the network of a training, and return its registration and metrics.

    Args:
        num_cases: All cases of the site; a fold registers those that it trains with.
        pretrained_weights: Checkpoint that it would start from.
        masked_in: The preprocessed folder of the dataset, where the federation masks statistics; else None.
        networks: Whether all sites plan the same network, or each its own.

    Raises:
        FederationError: The trainer is none for federations.
    """
    trainer = recursive_find_trainer_class_by_name(trainer_name)
    if not issubclass(trainer, FederatedTraining):
        raise FederationError(f"{trainer_name} trains without a federation: nothing leaves the site")
    manager = PlansManager(dict(plans))
    description, labels = manager.get_configuration(configuration), manager.get_label_manager(dataset_json)
    network = build_network(
        trainer.build_network_architecture,
        plans_manager=manager,
        configuration_manager=description,
        dataset_json=dict(dataset_json),
        num_output_channels=labels.num_segmentation_heads,
        enable_deep_supervision=True,
        num_input_channels=determine_num_input_channels(manager, description, dataset_json),
    )
    registered = plans if masked_in is None else without_own_statistics(plans, pooled_fingerprint(masked_in))
    registration = describe_training(
        network,
        plans=registered if networks == "equal" else plans_to_register(registered, configuration),
        dataset_json=dataset_json,
        configuration=configuration,
        fold=0,
        trainer=trainer,
        num_training_cases=num_cases,
        mirroring_axes=rotation_and_patch_size(description.patch_size)[3],
        requires_equal_plans=trainer.requires_equal_plans,
        pretrained_weights=None if pretrained_weights is None else file_digest(pretrained_weights),
        privacy=trainer.example_of_privacy,
    )
    if not trainer.sends_figures:
        return PlannedTraining(registration, (), (), None)
    classes = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    return PlannedTraining(
        registration, METRICS, METRICS_OF_VALIDATION if trainer.sends_before_validation else (), len(classes)
    )
