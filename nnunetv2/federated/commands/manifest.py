"""List everything that leaves this site, field by field and tensor by tensor, before anything does.

Nothing is sent, and no coordinator is needed: the documents are built as planning and training build them, with the
real values where they are known already, and with values of the same size where they are not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.federated.errors import FederationError, NotJoinedError
from nnunetv2.federated.privacy.min_cases import refusal_of
from nnunetv2.utilities.json_files import read_json
from nnunetv2.utilities.plain_text import shell_command, show

if TYPE_CHECKING:
    from nnunetv2.federated.privacy.allow_list import AllowedDocument, AllowList
    from nnunetv2.federated.protocol.document import TensorSpec
    from nnunetv2.federated.protocol.messages import Message, Part, Precision, Registration
    from nnunetv2.federated.site.credential import SiteCredential

UNKNOWN = "known only later"
MEASURED = -0.123456789012345678
"""Stands for a number that is not known yet: as long as numbers get."""
ALLOWANCE = 1 << 20
"""Bytes by which a document may be larger than foreseen, at least."""
MAX_BINS = 6
SHOWN = 500
"""Characters of a value, or of the names in it."""


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """One kind of document that leaves the site."""

    when: str
    message: Message | Part
    specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    passed_on: str
    """What the other sites get to see of it."""
    known: bool = True
    """Whether the values are the real ones."""

    @property
    def kind(self) -> str:
        """Return the kind of the message."""
        return getattr(self.message, "kind", "failure_report")

    @property
    def size(self) -> int:
        """Return how many bytes travel."""
        from nnunetv2.federated.protocol.document import document_size
        from nnunetv2.federated.protocol.strict_json import encode_json

        return (
            document_size(self.message, self.specs) if hasattr(self.message, "kind") else len(encode_json(self.message))
        )


# ------------------------------------------------------------------------------------------------------- documents
def planning_documents(
    dataset_json: Mapping[str, Any],
    num_cases: int,
    *,
    plans: Mapping[str, Any] | None = None,
    share_extrema: bool = False,
) -> list[Leaving]:
    """Return what `nnUNetv2_plan_and_preprocess --federated` sends.

    Args:
        plans: Plans of about the size of those that will be compared; None leaves them out.
    """
    from nnunetv2.federated.aggregation import fingerprint_statistics
    from nnunetv2.federated.protocol import messages
    from nnunetv2.federated.protocol.document import TensorSpec

    channels = dataset_json.get("channel_names") or dataset_json["modality"]
    moments = messages.ChannelMoments(count=10**9, mean=MEASURED, m2=-MEASURED)
    triple = (-MEASURED,) * 3
    bins = (tuple(range(65_530, 65_530 + MAX_BINS)),) * len(channels)
    fine = {f"fine.{c}": TensorSpec("I64", (MAX_BINS, fingerprint_statistics.NUM_BINS)) for c in range(len(channels))}
    documents = [
        Leaving(
            when="planning, first exchange",
            passed_on="the sum of the cases of all sites",
            message=messages.Census(
                num_cases=num_cases,
                channel_names=channels,
                labels=dataset_json["labels"],
                regions_class_order=dataset_json.get("regions_class_order"),
                share_extrema=share_extrema,
            ),
        ),
        Leaving(
            when="planning, second exchange",
            known=False,
            passed_on="nothing of it; later all spacings and shapes in one sorted list, without names of sites"
            + (
                ""
                if share_extrema
                else ". Smallest and largest voxel stay here: in the histograms, the "
                "outermost values are counted farther out"
            ),
            message=messages.CoarseSummary(
                spacings=(triple,) * num_cases,
                shapes=((1000, 1000, 1000),) * num_cases,
                relative_sizes=(-MEASURED,) * num_cases,
                moments=(moments,) * len(channels),
                promotes_to_float64=False,
                extrema=((MEASURED, MEASURED),) * len(channels) if share_extrema else None,
            ),
            specs={f"coarse.{c}": TensorSpec("I64", (fingerprint_statistics.NUM_BINS,)) for c in range(len(channels))},
        ),
        Leaving(
            when="planning, third exchange",
            known=False,
            passed_on="per channel: mean, standard deviation, median and percentiles of all sites together",
            message=messages.FineSummary(bins=bins),
            specs=fine,
        ),
    ]
    if not share_extrema:
        documents.append(
            Leaving(
                when="planning, third exchange, where a percentile of all sites lies among this site's outermost "
                "values: then fewer of them are hidden, if need be none",
                known=False,
                passed_on="which bins of all sites' histograms hold the percentiles, and then the same as above",
                message=messages.FineSummary(bins=bins, corrected=tuple(range(len(channels)))),
                specs=fine
                | {f"coarse.{c}": TensorSpec("I64", (fingerprint_statistics.NUM_BINS,)) for c in range(len(channels))},
            )
        )
    if plans is not None:
        documents.append(
            Leaving(
                when="planning, to compare the plans",
                message=messages.PlansReport(plans=dict(plans)),
                known=False,
                passed_on="the digest; if plans differ, the first field that does",
            )
        )
    return documents


def training_documents(
    registration: Registration,
    *,
    metrics: Sequence[str],
    later_metrics: Sequence[str],
    num_classes: int,
    precision: Precision = "float32",
) -> list[Leaving]:
    """Return what training sends, from its registration to its last round.

    Args:
        metrics: Names of the figures of an epoch that travel with its update.
        later_metrics: Names of those that travel with the next one.
        num_classes: Foreground classes or regions.
        precision: How the tensors of the rounds travel.
    """
    from nnunetv2.federated.aggregation import matching
    from nnunetv2.federated.aggregation.codecs import codec_of
    from nnunetv2.federated.protocol import api, keys, messages
    from nnunetv2.federated.protocol.document import TensorSpec

    run = keys.run_name(registration.configuration, registration.fold, registration.trainer)
    specs = {
        entry.name: TensorSpec(entry.dtype, entry.shape)
        for entry in registration.tensors
        if entry.dtype in matching.SHAREABLE
    }

    def values(names: Sequence[str]) -> dict[str, Any]:
        return {name: [MEASURED] * num_classes if name.startswith("dice_per") else MEASURED for name in names}

    earlier = messages.EarlierMetrics(round=10**7, metrics=values(later_metrics)) if later_metrics else None
    counted = (float(2**53 - 1),) * num_classes
    return [
        Leaving(
            when=f"training {registration.configuration}, before the first round",
            message=registration,
            passed_on="which site has most training cases, the names of the tensors, and how many are shared",
        ),
        Leaving(
            when=f"training {registration.configuration}, before the first round: initial values",
            message=messages.Update(),
            specs=specs,
            known=False,
            passed_on="for each tensor, the values of the site with most cases that has it; at most all of these",
        ),
        Leaving(
            when=f"training {registration.configuration}, every round: the tensors that another site has too, at "
            "most these",
            message=messages.Update(metrics=values(metrics), earlier=earlier),
            known=False,
            specs=codec_of(precision).specs(specs),
            passed_on="the weighted average of the tensors",
        ),
        Leaving(
            when=f"training {registration.configuration}, every round that is validated",
            known=False,
            message=messages.Validation(tp=counted, fp=counted, fn=counted, loss=MEASURED),
            passed_on="the Dice per class, of all sites together",
        ),
        Leaving(
            when=f"training {registration.configuration}, if it fails",
            known=False,
            message=api.FailureReport(run=run, round=10**7, reason="OutOfMemoryError"),
            passed_on="all of it; the reason is a kind of error, never its text",
        ),
    ]


# ------------------------------------------------------------------------------------------------------- describing
def describe(documents: Sequence[Leaving], credential: SiteCredential | None) -> Iterator[str]:
    """Yield the lines that people read."""
    refusal = next(filter(None, map(_refusal_of, documents)), None)
    if refusal is not None:
        yield f"As it is, nothing of what follows leaves this site: {refusal}"
        yield ""
    if credential is None:
        yield "This site has not joined a federation. What is listed here would go to the coordinator that it joins."
    else:
        yield (
            f"Site {credential.site} sends this to the coordinator of {credential.federation} at {credential.url}, "
            "and to nobody else:"
        )
    listed: Mapping[str, TensorSpec] = {}
    for document in documents:
        yield ""
        yield f"{document.when}"
        yield f"  message {document.kind}, {document.size:,} bytes; the other sites see: {document.passed_on}"
        yield from (f"    {line}" for line in describe_fields(document.message, known=document.known))
        if document.specs:
            total = f"{_count(document.specs, 'tensor')}, {sum(one.nbytes for one in document.specs.values()):,} bytes"
            is_listed, listed = document.specs == listed, document.specs
            yield f"    {total}, the same as above" if is_listed else f"    {total}:"
            for name, spec in () if is_listed else document.specs.items():
                yield f"    tensor {name}  {spec}  {spec.nbytes:,} bytes"
    yield ""
    yield "Every request also carries the token of this site; the coordinator sees where it comes from, and when."
    yield "Images, segmentations, names of cases, paths and logs never leave."


def describe_fields(message: Part, prefix: str = "", *, known: bool = True) -> Iterator[str]:
    """Yield a line per field that says something: its path and value, or how many values there are."""
    from nnunetv2.federated.protocol.messages import Part

    for name in type(message).model_fields:
        value, path = getattr(message, name), f"{prefix}{name}"
        if isinstance(value, Part):
            yield from describe_fields(value, f"{path}.", known=known)
        elif name == "plans" and known:  # some of its fields tell of the data: whoever decides wants to see which
            yield from (f"{path}.{key}: {_shortened(_as_json(one))}" for key, one in value.items())
        elif value not in (None, (), {}):
            yield f"{path}: {_describe_value(value, known or path in ('protocol', 'kind'))}"


def _describe_value(value: Any, known: bool) -> str:
    from nnunetv2.federated.protocol.messages import Part

    if isinstance(value, Mapping):
        text = _as_json(dict(value))
        return text if known and len(text) <= SHOWN else f"{_count(value)}: {_shortened(', '.join(map(str, value)))}"
    if isinstance(value, tuple) and isinstance(value[0], Part):
        return f"{_count(value)} of {', '.join(type(value[0]).model_fields)}"
    if isinstance(value, tuple):
        return _count(value) if not known or len(value) > 8 else _as_json(value)
    return _as_json(value) if known else UNKNOWN


def _as_json(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _count(values: Any, what: str = "value") -> str:
    return f"{len(values)} {what}{'' if len(values) == 1 else 's'}"


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def _refusal_of(document: Leaving) -> str | None:
    """Say why this site would not send a document, because it has too few cases."""
    from nnunetv2.federated.protocol.messages import Census, Registration

    if isinstance(document.message, Census):
        return refusal_of(document.message.num_cases, "the dataset")
    if isinstance(document.message, Registration):
        return refusal_of(document.message.num_training_cases, "the dataset")
    return None


# ------------------------------------------------------------------------------------------------------- allow-list
def allow_list_of(documents: Sequence[Leaving], credential: SiteCredential | None) -> AllowList:
    """Return the list that allows these documents, and nothing that is not among their fields and tensors."""
    from nnunetv2.federated.privacy.allow_list import AllowList

    by_kind: dict[str, list[Leaving]] = {}
    for document in documents:
        by_kind.setdefault(document.kind, []).append(document)
    return AllowList(
        coordinator=None if credential is None else credential.url,
        documents={kind: _allow(group) for kind, group in sorted(by_kind.items())},
    )


def _allow(documents: Sequence[Leaving]) -> AllowedDocument:
    from nnunetv2.federated.privacy.allow_list import AllowedDocument

    size = max(document.size for document in documents)
    fields = {path for document in documents for path in field_patterns(document.message)}
    tensors = {tensor_pattern(name) for document in documents for name in document.specs}
    return AllowedDocument(
        fields=tuple(sorted(fields)), tensors=tuple(sorted(tensors)), largest_bytes=size + max(size // 4, ALLOWANCE)
    )


def field_patterns(message: Part, prefix: str = "") -> Iterator[str]:
    """Yield a pattern per field that says something: its path, with `.*` where the names below it are data."""
    from nnunetv2.federated.protocol.messages import Part

    for name in type(message).model_fields:
        value, path = getattr(message, name), f"{prefix}{name}"
        parts = [one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, Part)]
        if parts:
            yield from {pattern for part in parts for pattern in field_patterns(part, f"{path}.")}
        elif isinstance(value, Mapping):
            yield from (f"{path}.{key}" for key in value) if name == "metrics" else (f"{path}.*",)
        elif value not in (None, ()):
            yield path


def tensor_pattern(name: str) -> str:
    """Return the pattern for the tensors of the same part of a network: `encoder.stages.0.weight` -> `encoder.*`."""
    head, dot, _ = name.partition(".")
    return f"{head}{dot}*"


# ---------------------------------------------------------------------------------------------- the site's own files
def collect(
    dataset: str,
    configurations: Sequence[str],
    *,
    trainer: str,
    plans_name: str,
    share_extrema: bool = False,
    precision: Precision = "float32",
    pretrained_weights: Path | None = None,
) -> list[Leaving]:
    """Return what this site sends of a dataset, from its folders in nnUNet_raw and nnUNet_preprocessed.

    Args:
        configurations: Those to be trained. None given: all that the plans have, if there are plans.
        pretrained_weights: Checkpoint that training is to start from.

    Raises:
        FederationError: The dataset is not there, or the trainer is none for federations.
    """
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    name = maybe_convert_to_dataset_name(dataset)
    roots = [Path(str(root), name) for root in (nnUNet_raw, nnUNet_preprocessed) if root.is_set()]
    folder = next((one for one in roots if (one / "dataset.json").is_file()), None)
    if folder is None:
        raise FederationError(f"there is no dataset.json of {name}, neither in nnUNet_raw nor in nnUNet_preprocessed")
    dataset_json = _read(folder / "dataset.json")
    num_cases = _count_cases(folder, dataset_json)
    plans_file = roots[-1] / f"{plans_name}.json"
    plans = _read(plans_file) if plans_file.is_file() else None
    if plans is None and configurations:
        raise FederationError(
            f"{plans_file} is missing: plan first. Before, only what planning sends can be listed: "
            "leave out the configurations"
        )
    documents = planning_documents(dataset_json, num_cases, plans=plans, share_extrema=share_extrema)
    for configuration in configurations or (plans or {"configurations": ()})["configurations"]:
        documents += _training_documents(
            plans, dataset_json, configuration, trainer, num_cases, precision, pretrained_weights
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
) -> list[Leaving]:
    from nnunetv2.training.nnUNetTrainer.variants.federated.dry_run import foresee_training

    foreseen = foresee_training(
        plans,
        dataset_json,
        configuration=configuration,
        trainer_name=trainer,
        num_cases=num_cases,
        pretrained_weights=pretrained_weights,
    )
    return training_documents(
        foreseen.registration,
        metrics=foreseen.metrics,
        later_metrics=foreseen.later_metrics,
        num_classes=foreseen.num_classes,
        precision=precision,
    )


def _count_cases(folder: Path, dataset_json: Mapping[str, Any]) -> int:
    """Count the training cases as planning does, or take what dataset.json says where the raw data are elsewhere."""
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    if (folder / "imagesTr").is_dir() or "dataset" in dataset_json:
        return len(get_filenames_of_train_images_and_targets(str(folder), dict(dataset_json)))
    return int(dataset_json["numTraining"])


def _read(path: Path) -> dict[str, Any]:
    return read_json(path)


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
    from nnunetv2.federated.protocol.messages import PlansReport
    from nnunetv2.federated.site.credential import load_credential

    arguments = build_parser().parse_args(argv)
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
        pretrained_weights=arguments.pretrained_weights,
        precision=(credential and credential.precision) or "float32",
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
        from nnunetv2.utilities.atomic_write import save_json_atomically

        path = arguments.write_allow_list.expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_json_atomically(allow_list_of(documents, credential).model_dump(mode="json"), path)
        show("", f"Written: {path}")
    return 0


def manifest_entry() -> None:
    """Entry point of the console script."""
    from nnunetv2.utilities.command_line import run_command

    run_command(main)
