"""The documents that a small site would send."""

from fake_federation import make_plans, make_registration

from nnunetv2.federated.privacy.disclosure import Disclosure
from nnunetv2.federated.site.planned_documents import planning_documents, training_documents

DATASET = {
    "channel_names": {"0": "CT", "1": "PET"},
    "labels": {"background": 0, "liver": 1, "tumour": [1, 2]},
    "regions_class_order": [1, 2],
    "numTraining": 7,
    "file_ending": ".nii.gz",
}
METRICS = ("val_losses", "dice_per_class_or_region")


def make_documents(*, is_masked: bool = False, **options) -> list[Disclosure]:
    return [
        *planning_documents(DATASET, 7, plans=make_plans(), is_masked=is_masked, **options),
        *training_documents(
            make_registration(), metrics=METRICS, later_metrics=METRICS, num_classes=2, is_masked=is_masked
        ),
    ]


def by_kind(kind: str, **options) -> list[Disclosure]:
    return [document for document in make_documents(**options) if document.kind == kind]
