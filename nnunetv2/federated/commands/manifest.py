"""List every field and tensor that leaves this site, before anything does.

Nothing is sent, and no coordinator is needed: the documents are built as planning and training build them, with the
real values where they are known already, and with values of the same size where they are not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.federated.errors import FederationError, NotJoinedError
from nnunetv2.federated.privacy.min_cases import refusal_of
from nnunetv2.utilities.json_files import read_json
from nnunetv2.utilities.plain_text import shell_command, show

if TYPE_CHECKING:
    from nnunetv2.federated.privacy.disclosure import Disclosure
    from nnunetv2.federated.protocol.document import TensorSpec
    from nnunetv2.federated.protocol.messages import Networks, Precision
    from nnunetv2.federated.site.credential import SiteCredential


# ------------------------------------------------------------------------------------------------------- describing
def describe(documents: Sequence[Disclosure], credential: SiteCredential | None) -> Iterator[str]:
    """Yield the lines that people read."""
    from nnunetv2.federated.privacy.disclosure import count, describe_fields

    refusal = next(filter(None, map(_refusal_of, documents)), None)
    if refusal is not None:
        yield f"As it is, nothing of what follows leaves this site: {refusal}"
        yield ""
    if credential is None:
        yield "This site has not joined a federation. What is listed here would go to the coordinator that it joins."
    else:
        yield (
            f"Site {credential.site} sends this to the coordinator of {credential.federation} at "
            f"{credential.coordinator}, and to nobody else:"
        )
    listed: Mapping[str, TensorSpec] = {}
    for document in documents:
        yield ""
        yield f"{document.when}"
        yield f"  message {document.kind}, {document.size:,} bytes; the other sites see: {document.passed_on}"
        yield from (f"    {line}" for line in describe_fields(document.message, known=document.known))
        if document.specs:
            total = f"{count(document.specs, 'tensor')}, {sum(one.nbytes for one in document.specs.values()):,} bytes"
            is_listed, listed = document.specs == listed, document.specs
            yield f"    {total}, the same as above" if is_listed else f"    {total}:"
            for name, spec in () if is_listed else document.specs.items():
                yield f"    tensor {name}  {spec}  {spec.nbytes:,} bytes"
    yield ""
    yield "Every request also carries the token of this site; the coordinator sees where it comes from, and when."
    yield "nnUNetv2_fed_check sends random bytes besides, made for the purpose, to measure the line."
    yield "Images, segmentations, names of cases, paths and logs never leave."


def _refusal_of(document: Disclosure) -> str | None:
    """Explain why a document has too few cases to be sent; else None."""
    from nnunetv2.federated.protocol.messages import Census, Registration

    if isinstance(document.message, Census):
        return refusal_of(document.message.num_cases, "the dataset")
    if isinstance(document.message, Registration):
        return refusal_of(document.message.num_training_cases, "the dataset")
    return None


# ---------------------------------------------------------------------------------------------- the site's own files
def collect(
    dataset: str,
    configurations: Sequence[str],
    *,
    trainer: str,
    plans_name: str,
    share_extrema: bool = False,
    is_masked: bool = False,
    precision: Precision = "float32",
    pretrained_weights: Path | None = None,
    networks: Networks = "equal",
) -> list[Disclosure]:
    """Return the disclosures of a dataset, from its raw and preprocessed folders.

    Args:
        configurations: Those to be trained. None given: all that the plans have, if there are plans.
        is_masked: Whether the federation masks updates and statistics.
        pretrained_weights: Checkpoint that training is to start from.
        networks: Whether all sites plan the same network, or each its own.

    Raises:
        FederationError: The dataset is not there, or the trainer is none for federations.
    """
    from nnunetv2.federated.site.planned_documents import planning_documents
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    name = maybe_convert_to_dataset_name(dataset)
    roots = [Path(str(root), name) for root in (nnUNet_raw, nnUNet_preprocessed) if root.is_set()]
    folder = next((one for one in roots if (one / "dataset.json").is_file()), None)
    if folder is None:
        raise FederationError(f"there is no dataset.json of {name}, neither in nnUNet_raw nor in nnUNet_preprocessed")
    dataset_json = read_json(folder / "dataset.json")
    num_cases = _count_cases(folder, roots[-1], dataset_json)
    plans_file = roots[-1] / f"{plans_name}.json"
    plans = read_json(plans_file) if plans_file.is_file() else None
    if plans is None and configurations:
        raise FederationError(
            f"{plans_file} is missing: plan first. Before, only what planning sends can be listed: "
            "leave out the configurations"
        )
    documents = planning_documents(
        dataset_json, num_cases, plans=plans, share_extrema=share_extrema, is_masked=is_masked, networks=networks
    )
    if plans is None:
        return documents
    masked_in = roots[-1] if is_masked else None
    planned_file = roots[-1] / "dataset.json"
    if planned_file.is_file() and "annotated_labels" in (planned := read_json(planned_file)):
        dataset_json = planned  # with the classes of all sites
    for configuration in configurations or plans["configurations"]:
        documents += _training_documents(
            plans, dataset_json, configuration, trainer, num_cases, precision, pretrained_weights, masked_in, networks
        )
    return documents


def _training_documents(
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    configuration: str,
    trainer: str,
    num_cases: int,
    precision: Precision,
    pretrained_weights: Path | None,
    masked_in: Path | None,
    networks: Networks,
) -> list[Disclosure]:
    """Return the disclosures of one training.

    Args:
        masked_in: The preprocessed folder of the dataset, where the federation masks updates; else None.
        networks: Whether all sites plan the same network, or each its own.
    """
    from nnunetv2.federated.site.planned_documents import training_documents
    from nnunetv2.training.nnUNetTrainer.variants.federated.dry_run import dry_run

    planned = dry_run(
        plans,
        dataset_json,
        configuration=configuration,
        trainer_name=trainer,
        num_cases=num_cases,
        pretrained_weights=pretrained_weights,
        masked_in=masked_in,
        networks=networks,
    )
    return training_documents(
        planned.registration,
        metrics=planned.metrics,
        later_metrics=planned.later_metrics,
        num_classes=planned.num_classes,
        precision=precision,
        is_masked=masked_in is not None,
        networks=networks,
    )


def _count_cases(folder: Path, preprocessed_folder: Path, dataset_json: Mapping[str, Any]) -> int:
    """Count the training cases as planning does, or as dataset.json says."""
    from nnunetv2.preprocessed_data.bad_cases import list_training_cases

    if (folder / "imagesTr").is_dir() or "dataset" in dataset_json:
        return len(list_training_cases(folder, preprocessed_folder, dict(dataset_json)))
    return int(dataset_json["numTraining"])


# ---------------------------------------------------------------------------------------------------- command line
def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_fed_manifest`."""
    parser = argparse.ArgumentParser(
        description="List what leaves this site: fields, tensors, sizes, to whom. Sends nothing."
    )
    parser.add_argument("dataset", metavar="DATASET", help="name or id of the dataset")
    parser.add_argument(
        "configurations",
        metavar="CONFIGURATION",
        nargs="*",
        help="what is to be trained, for example 3d_fullres; default: all that the plans have",
    )
    parser.add_argument("-tr", default="nnUNetTrainerAsymFedAvg", help="trainer (default: %(default)s)")
    parser.add_argument("-p", default="nnUNetPlans", help="plans (default: %(default)s)")
    parser.add_argument(
        "-pretrained_weights",
        type=Path,
        metavar="FILE",
        help="checkpoint that training is to start from: its SHA-256 leaves, to be compared",
    )
    parser.add_argument(
        "--share_extrema",
        action="store_true",
        help="as if planned with --share_extrema: smallest and largest voxel of each channel leave too",
    )
    parser.add_argument(
        "--write-allow-list",
        type=Path,
        metavar="FILE",
        help="write the list of what this site lets out from now on, if FILE is "
        "~/.config/nnunet/federated_allow.json or the environment variable nnUNet_fed_allow "
        "names it",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `nnUNetv2_fed_manifest`."""
    from nnunetv2.federated.site.credential import load_credential

    arguments = build_parser().parse_args(argv)
    from nnunetv2.federated.protocol.messages import PlansReport

    try:
        credential = load_credential()
    except NotJoinedError:
        credential = None
    documents = collect(
        arguments.dataset,
        arguments.configurations,
        trainer=arguments.tr,
        plans_name=arguments.p,
        share_extrema=arguments.share_extrema,
        is_masked=credential is not None and credential.secure is not None,
        pretrained_weights=arguments.pretrained_weights,
        precision="float32" if credential is None else credential.precision or "float32",
        networks="equal" if credential is None else credential.networks or "equal",
    )
    show(*describe(documents, credential))
    if not any(isinstance(document.message, PlansReport) for document in documents):
        command = shell_command("nnUNetv2_plan_and_preprocess", options=[("-d", arguments.dataset), ("--no_pp", None)])
        show(
            "",
            "There are no plans yet. That planning sends them at its end, and what training sends, is not listed "
            f"here: {command}, then look again.",
        )
    if arguments.write_allow_list is not None:
        from nnunetv2.federated.privacy.disclosure import allow_list_of
        from nnunetv2.utilities.atomic_write import save_json_atomically

        path = arguments.write_allow_list.expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        allowed = allow_list_of(documents, coordinator=None if credential is None else credential.coordinator)
        save_json_atomically(allowed.model_dump(mode="json"), path)
        show("", f"Written: {path}")
    return 0


def manifest_entry() -> None:
    """Entry point of the console script."""
    from nnunetv2.utilities.command_line import run_command

    run_command(main)
