"""Build the documents of masked sums before they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnunetv2.federated.aggregation import fingerprint_sums, geometry_quantiles
from nnunetv2.federated.exchanges import secure_sums
from nnunetv2.federated.privacy.disclosure import Disclosure
from nnunetv2.federated.privacy.secure_aggregation.key_agreement import ENVELOPE_OVERHEAD
from nnunetv2.federated.privacy.secure_aggregation.masking import SEED_BYTES
from nnunetv2.federated.privacy.secure_aggregation.protocol import CHECK_WORDS, MAX_SITES
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.document import TensorSpec
from nnunetv2.federated.protocol.secure_fingerprint_messages import (
    Branch,
    CaseTable,
    CoarseHistograms,
    DigitCounts,
    FineHistograms,
    Steps,
)
from nnunetv2.federated.protocol.secure_messages import MAX_GROUPS, Confirmation, MaskedUpdate, UnmaskingShares

A_DIGEST, A_KEY, A_SIGNATURE = "0" * 64, "0" * 64, "0" * 128
"""Stand for values that are made on sending."""
MAX_BINS = 6
MANY_CASES = 10_000
"""Of all sites together, for which room is planned: how many they have is not known here."""
OTHERS_SEE = "nothing but the sum of all sites: it is masked by numbers that cancel out in the sum only"


def a_signed_key() -> messages.SignedKey:
    """Return a stand-in for a site's key."""
    return messages.SignedKey(identity=A_KEY, exchange_key=A_KEY, signature=A_SIGNATURE)


def masked_documents(
    when: str, lanes: Mapping[str, tuple[str, int]], *, sums_tell: str, most_lanes: int | None = None
) -> list[Disclosure]:
    """Return the documents of sums that are made together, each once.

    Args:
        when: Such as "planning".
        lanes: Name of the sum -> dtype of its words, and how many numbers are added up.
        sums_tell: The information that the sums give the coordinator, as a sentence.
        most_lanes: How many sums there may be, where that is not known yet.
    """
    seeds = MAX_SITES * (most_lanes or len(lanes))
    envelope = ENVELOPE_OVERHEAD + SEED_BYTES * seeds
    specs = {f"masked.{name}": TensorSpec(dtype, (CHECK_WORDS + size,)) for name, (dtype, size) in lanes.items()}
    specs["envelope.each_site"] = TensorSpec("U8", (MAX_SITES * envelope,))
    specs["commitments"] = TensorSpec("U8", (seeds, SEED_BYTES))
    return [
        Disclosure(
            when=f"{when}: masked numbers, and keys to unmask the sum, in envelopes that one other site can open",
            message=MaskedUpdate(lanes=dict.fromkeys(lanes, A_DIGEST)),
            specs=specs,
            known=False,
            passed_on=f"{OTHERS_SEE}. {sums_tell}",
        ),
        Disclosure(
            when=f"{when}: that this site has seen who takes part",
            message=Confirmation(digest=A_DIGEST, signature=A_SIGNATURE),
            known=False,
            passed_on="the signature",
        ),
        Disclosure(
            when=f"{when}: shares of the keys that the sum still contains, for one set of sites and never another",
            message=UnmaskingShares(),
            specs={"shares": TensorSpec("U8", (MAX_SITES * seeds, SEED_BYTES))},
            known=False,
            passed_on="nothing",
        ),
    ]


def round_sums(when: str, specs: Mapping[str, TensorSpec], precision: messages.Precision) -> list[Disclosure]:
    """Return the documents of a masked round.

    Args:
        specs: The tensors of the network.
    """
    size = sum(spec.size for spec in specs.values())
    weights = ("U32" if precision == "float32" else "U16", size)
    figures = {name: ("U64", len(metrics)) for name, metrics in secure_sums.FIGURES.items()}
    return masked_documents(
        when,
        {"weights": weights, secure_sums.CHANGES: ("U64", 2), **figures},
        sums_tell="It tells the average of the weights, of the losses and of the Dice, and how far the sites have "
        "moved together; tensors of different sites are added up apart",
        most_lanes=MAX_GROUPS + 1 + len(figures),
    )


def validation_sums(when: str, num_classes: int) -> list[Disclosure]:
    """Return the documents of the masked validation of an aggregate."""
    return masked_documents(
        when,
        {secure_sums.COUNTS: ("U64", 3 * num_classes), secure_sums.LOSS: ("U64", 1)},
        sums_tell="It tells the Dice per class and the loss, of all sites together",
    )[:1]


def planning_sums(num_channels: int) -> list[Disclosure]:
    """Return the documents of the sums of a fingerprint, in their order."""
    steps = Steps(pivot=0.0, exponent=0)
    most = (Branch(prefix=0, below=0),) * geometry_quantiles.MOST_BRANCHES
    few = most[: geometry_quantiles.MOST_BRANCHES // 2]
    questions: Sequence[tuple[str, Any, str]] = (
        ("counts of intensities", CoarseHistograms(), "It tells how many voxels of all sites have which intensity"),
        (
            "insides of the bins with the percentiles, and sums of the intensities",
            FineHistograms(bins=(tuple(range(MAX_BINS)),) * num_channels, steps=(steps,) * num_channels),
            "It tells percentiles, mean and standard deviation of all sites together",
        ),
        (
            "spacings, shapes and relative sizes, with --geometry list",
            CaseTable(),
            "It tells those of every case of all sites, and of none whose it is; what only one site's scanner "
            "makes may still say so",
        ),
        (
            "spacings, shapes and relative sizes, with --geometry quantiles",
            DigitCounts(level=0, branches=(most,) * 3 + (few,) * 4),
            "It tells how these are distributed in steps of 6 percent, and exactly at the wanted ranks",
        ),
        (
            "shapes at the target spacing, with --geometry quantiles",
            DigitCounts(level=0, branches=(few,) * 3),
            "It tells how these are distributed in steps of 6 percent, and their median exactly",
        ),
    )
    documents: list[Disclosure] = []
    for what, question, sums_tell in questions:
        size = fingerprint_sums.num_words(question, num_channels=num_channels, num_cases=MANY_CASES)
        masked, *others = masked_documents(f"planning, {what}", {"sum": ("U64", size)}, sums_tell=sums_tell)
        documents += [masked] if documents else [masked, *others]
    return documents
