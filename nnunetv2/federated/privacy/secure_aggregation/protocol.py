"""Add up vectors without showing any: secure aggregation by double masking.

Method: Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning (CCS 2017). Its steps
stand here in order, under their names, as functions on plain values that know of no network, disk or federation:

    step (paper)            here                                    sent by a site         learned by all
    0 AdvertiseKeys         once per run, before this               run key, signed        `Cohort`
    1 ShareKeys             share_keys                              envelopes              envelopes for it
    2 MaskedInputCollection mask_input_                             masked vectors         names of the survivors
    3 ConsistencyCheck      check_survivors, survivors_digest       signature of these     t signatures
    4 Unmasking             reveal_shares; rebuild_seeds, unmask_   shares of seeds        the sum

For a vector x over the holders H of a lane, a site u sends, modulo 2^16, 2^32 or 2^64:

    y_u = x_u + PRG(b_u) + sum PRG(s_uv) over v in H above u - sum PRG(s_uv) over v in H below u

Deviations from the paper: keys are agreed on once per run, since every seed is derived from them and from all that
its vector is about (`Cohort.context`). So steps 1 and 2 are one upload. The secret that is shared for a site that
drops out is each pair seed, not the key it comes from, which would open other rounds. Several lanes travel at
once, each a sum of its own over the sites that send it.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, islice
from types import MappingProxyType

import numpy as np

from nnunetv2.federated.errors import AggregationError, RefusedError, WireError
from nnunetv2.federated.privacy.secure_aggregation import shamir
from nnunetv2.federated.privacy.secure_aggregation.key_agreement import (
    agree,
    derive_key,
    digest_of,
    open_envelope,
    seal_envelope,
    with_lengths,
)
from nnunetv2.federated.privacy.secure_aggregation.masking import SEED_BYTES, Keystreams, apply_masks_

MIN_SITES = 3
"""With two, each learns the other's vector from the sum."""
MAX_SITES = 64
"""Every site masks with every other one: beyond this, neither that nor the shares are small work any more."""
CHECK_WORDS = 4
"""In front of every vector: 1, the weight of the site, 0, 0. Their sums tell whether all masks are gone."""
WORDS: dict[str, np.dtype] = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "U64": np.dtype("<u8")}
"""Name, as in documents -> numpy dtype of the integers that are added."""
_SUBSETS_TRIED = 2000
"""Sets of answers from which one seed is rebuilt before it is said that they do not fit."""

SeedName = tuple[str, str]
"""Lane and site: of a site u, (lane, u) is its self seed, (lane, v) the seed that it has in common with v."""


# ------------------------------------------------------------------------------------------------ 0 AdvertiseKeys
@dataclass(frozen=True)
class Cohort:
    """The sites that mask with each other in one exchange, and their keys.

    Raises:
        RefusedError: There are fewer than 3 sites (`cohort_too_small`), or more than 64 (`too_many_sites_for_secure`).
    """

    federation: str
    exchange: str
    """Key of the exchange that results in the sum. Other exchanges have other masks."""
    run_keys: Mapping[str, bytes]
    """Site -> public key of X25519."""
    identities: Mapping[str, bytes]
    """Site -> public key with which it signs."""

    def __post_init__(self) -> None:
        check_size(len(self.run_keys))
        if self.run_keys.keys() != self.identities.keys():
            raise WireError("every site of a cohort needs a run key and an identity")

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites, sorted."""
        return tuple(sorted(self.run_keys))

    @property
    def threshold(self) -> int:
        """Sites that can unmask together; fewer learn nothing."""
        return threshold_of(len(self.run_keys))

    def point(self, site: str) -> int:
        """Return where the polynomials are evaluated for a site."""
        return self.sites.index(site) + 1

    @cached_property
    def context(self) -> bytes:
        """Digest of federation, exchange, sites and their keys: part of every derived key."""
        keys = (
            part
            for site in self.sites
            for part in (site.encode(), bytes(self.identities[site]), bytes(self.run_keys[site]))
        )
        return digest_of(b"nnunet-fed cohort", self.federation.encode(), self.exchange.encode(), *keys)


def threshold_of(num_sites: int) -> int:
    """Return how many of so many sites unmask: two thirds of them and one more.

    Two sets of so many have more than a third of the sites in common. So a coordinator that shows two sets of survivors
    gets both seeds of a site only with that many colluding sites.
    """
    return 2 * num_sites // 3 + 1


def check_size(num_sites: int) -> None:
    """Raise RefusedError unless so many sites can add up anything."""
    if num_sites < MIN_SITES:
        raise RefusedError(
            f"{num_sites} site{'' if num_sites == 1 else 's'} cannot add up anything without showing it to each other: "
            f"secure aggregation needs {MIN_SITES}",
            "Wait for the others, or invite further sites.",
            code="cohort_too_small",
        )
    check_most(num_sites)


def check_most(num_sites: int) -> None:
    """Raise RefusedError if so many sites are too many to mask with each other."""
    if num_sites > MAX_SITES:
        raise RefusedError(
            f"secure aggregation is for {MAX_SITES} sites at most, not for {num_sites}",
            "Form smaller federations, or start the coordinator without --secure.",
            code="too_many_sites_for_secure",
        )


@dataclass(frozen=True)
class Lane:
    """One sum: a vector of integers that some sites of a cohort may send."""

    name: str
    holders: tuple[str, ...]
    """Sites that may send it, sorted."""
    dtype: str
    """Of its words, a key of `WORDS`."""
    size: int
    """Numbers; the check words come on top."""
    reference: bytes = b""
    """Digest of the state that all must have in common, such as the weights that the updates start from."""

    @property
    def length(self) -> int:
        """Words that travel."""
        return CHECK_WORDS + self.size

    def context(self, cohort: Cohort) -> bytes:
        """Return the digest of the cohort and everything about this lane."""
        size = self.size.to_bytes(8, "little")
        holders = with_lengths(*(site.encode() for site in self.holders))
        return digest_of(cohort.context, self.name.encode(), holders, self.dtype.encode(), size, self.reference)


def context_digest(cohort: Cohort, lanes: Iterable[Lane]) -> str:
    """Return the digest, in hex, that the masks of some lanes are bound to."""
    ordered = sorted(lanes, key=lambda lane: lane.name)
    return digest_of(cohort.context, *(lane.context(cohort) for lane in ordered)).hex()


# --------------------------------------------------------------------------------------------------- 1 ShareKeys
@dataclass(frozen=True)
class SharedKeys:
    """The seeds of one site in one exchange, with shares and commitments."""

    seeds: Mapping[SeedName, bytes] = field(repr=False)
    """Secret."""
    envelopes: Mapping[str, bytes]
    """Site -> its shares of all these seeds, which nobody else can read."""
    commitments: np.ndarray
    """SHA-256 of every seed, uint8 of shape (number of seeds, 32), in the order of `seed_names`."""


def seed_names(site: str, lanes: Iterable[Lane]) -> list[SeedName]:
    """List the seeds of a site with these lanes, in the order of its shares."""
    return [
        (lane.name, other)
        for lane in sorted(lanes, key=lambda lane: lane.name)
        for other in (site, *(holder for holder in lane.holders if holder != site))
    ]


def share_keys(
    cohort: Cohort,
    site: str,
    private_key: bytes,
    lanes: Sequence[Lane],
    common: Mapping[str, bytes] = MappingProxyType({}),
) -> SharedKeys:
    """Make the seeds of a site and share them among the cohort.

    The self seeds are new each time, so masks made twice differ: the masked document is to be kept and sent again.

    Args:
        private_key: That of the site's run key.
        lanes: Those that the site sends; it is among their holders.
        common: Other site -> digest of the values that this site and that one have both received. If these differ, no
            mask that they have in common cancels, in any lane.
    """
    secret_with = {other: agree(private_key, cohort.run_keys[other]) for other in cohort.sites}
    by_name = {lane.name: lane for lane in lanes}
    seeds = {
        (lane, other): secrets.token_bytes(SEED_BYTES)
        if other == site
        else derive_key(secret_with[other], b"pair seed", by_name[lane].context(cohort), common.get(other, b""))
        for lane, other in seed_names(site, lanes)
    }
    together = np.frombuffer(b"".join(seeds.values()), np.uint8).reshape(-1, SEED_BYTES)
    points = {other: cohort.point(other) for other in cohort.sites}
    shares = shamir.split(together, cohort.threshold, list(points.values()))
    dealt = _what_is_dealt(lanes)
    envelopes = {
        other: seal_envelope(
            _envelope_key(cohort, secret_with[other], site, other), shares[point].tobytes(), outside=dealt
        )
        for other, point in points.items()
    }
    return SharedKeys(seeds, envelopes, commitments_to(seeds.values()))


def commitments_to(seeds: Iterable[bytes]) -> np.ndarray:
    """Return commitments to seeds, uint8 of shape (number, 32).

    They tell a rebuilt seed from another one, and nothing of it.
    """
    digests = b"".join(digest_of(b"nnunet-fed seed", seed) for seed in seeds)
    return np.frombuffer(digests, np.uint8).reshape(-1, SEED_BYTES)


def _envelope_key(cohort: Cohort, secret: bytes, sender: str, receiver: str) -> bytes:
    return derive_key(secret, b"envelope", cohort.context, sender.encode(), receiver.encode())


def _what_is_dealt(lanes: Iterable[Lane]) -> bytes:
    """Return the digest of the lanes whose seeds a site deals, in the order of its shares.

    Envelopes are bound to it. Otherwise a coordinator that names another lane than the site has sent would be given the
    shares of one lane's seeds as those of another's, and so both seeds of one vector.
    """
    ordered = sorted(lanes, key=lambda lane: lane.name)
    return digest_of(*(with_lengths(*(part.encode() for part in (lane.name, *lane.holders))) for lane in ordered))


# --------------------------------------------------------------------------------------- 2 MaskedInputCollection
def with_check_words(lane: Lane, weight: int) -> np.ndarray:
    """Return a vector for a lane with its check words; the others are unset."""
    words = np.empty(lane.length, WORDS[lane.dtype])
    words[:CHECK_WORDS] = np.array((1, weight, 0, 0), np.uint64).astype(words.dtype)
    return words


def mask_input_(words: np.ndarray, lane: Lane, site: str, shared: SharedKeys) -> None:
    """Mask the vector of a site in place: check words and numbers."""
    plus = [shared.seeds[lane.name, site]]
    minus: list[bytes] = []
    for other in lane.holders:
        if other != site:
            (plus if site < other else minus).append(shared.seeds[lane.name, other])
    apply_masks_(words, plus=plus, minus=minus)


# --------------------------------------------------------------------------------------------- 3 ConsistencyCheck
Survivors = Mapping[str, tuple[str, ...]]
"""Lane -> the sites whose masked vectors are there, sorted. A site may have sent some of its lanes only."""


def survivors_digest(cohort: Cohort, survivors: Survivors) -> str:
    """Return the digest, in hex, that survivors sign, bound to cohort and exchange."""
    lanes = (
        with_lengths(name.encode(), *(site.encode() for site in sites)) for name, sites in sorted(survivors.items())
    )
    return digest_of(b"nnunet-fed survivors", cohort.context, *lanes).hex()


def sites_among(survivors: Survivors) -> tuple[str, ...]:
    """Return the sites that have sent anything, sorted."""
    return tuple(sorted({site for sites in survivors.values() for site in sites}))


def check_survivors(
    cohort: Cohort,
    lanes: Sequence[Lane],
    survivors: Survivors,
    *,
    site: str,
    sent: Collection[str],
    least: int,
    optional: Collection[str] = (),
) -> None:
    """Check, at a site, the coordinator's survivors before anything is signed.

    Args:
        site: This one.
        sent: Names of the lanes that it has sent.
        least: Sites that a sum is to have, at least.
        optional: Names of lanes that a site may leave out. All others it sends, so that none of them can have lost
            sites alone: the sum of such a lane would have fewer than t of its sites.

    Raises:
        RefusedError: There are too few of them, this site is not among them with exactly the lanes that it has sent, or
            they are not of the cohort.
    """
    named, holders = sites_among(survivors), {lane.name: lane.holders for lane in lanes}
    needed = max(least, cohort.threshold)
    is_possible = survivors.keys() <= holders.keys() and all(
        list(sites) == sorted(set(sites)) and set(sites) <= set(holders[name]) for name, sites in survivors.items()
    )
    is_whole = all(
        survivors.get(lane.name, ()) == tuple(one for one in lane.holders if one in named)
        for lane in lanes
        if lane.name not in optional
    )
    is_true_of_this_site = {name for name, sites in survivors.items() if site in sites} == {*sent}
    if len(named) < needed or site not in named or not is_possible or not is_whole or not is_true_of_this_site:
        raise RefusedError(
            f"the coordinator names {', '.join(named) or 'nobody'} as the sites whose updates are to be added, which "
            f"cannot be: it takes {needed} of {', '.join(cohort.sites)}, among them {site} with what it has sent",
            "Nothing was unmasked. Show this to the coordinating site.",
            code="survivors_implausible",
        )


# ------------------------------------------------------------------------------------------------------ 4 Unmasking
def unmasked_lanes(lanes: Iterable[Lane], survivors: Survivors, least: int) -> list[Lane]:
    """Return the lanes whose sums have enough sites, by name; others stay sealed."""
    ordered = sorted(lanes, key=lambda lane: lane.name)
    return [lane for lane in ordered if len(survivors.get(lane.name, ())) >= least]


def revealed_names(lane: Lane, site: str, survivors: Survivors) -> list[SeedName]:
    """List the seeds of a survivor that are rebuilt.

    Those are its self seed, and the ones that it has with sites that dropped out.
    So nobody ever learns both seeds of a site: its own self seed still masks the vector of one that dropped out.
    """
    sent = survivors[lane.name]
    return [(lane.name, site), *((lane.name, other) for other in lane.holders if other not in sent)]


def lanes_of(site: str, lanes: Iterable[Lane], survivors: Survivors) -> list[Lane]:
    """Return the lanes that a site has sent."""
    return [lane for lane in lanes if site in survivors.get(lane.name, ())]


def count_revealed(lanes: Iterable[Lane], survivors: Survivors, least: int) -> int:
    """Return how many shares each answer has."""
    return sum(
        len(revealed_names(lane, site, survivors))
        for lane in unmasked_lanes(lanes, survivors, least)
        for site in survivors[lane.name]
    )


def reveal_shares(
    cohort: Cohort,
    site: str,
    private_key: bytes,
    lanes: Sequence[Lane],
    survivors: Survivors,
    envelopes: Mapping[str, bytes],
    *,
    least: int,
) -> np.ndarray:
    """Return a site's shares of the seeds to rebuild, uint8 (number, 32).

    To be called after `check_survivors` and t valid signatures, and for one set of survivors only, ever.

    Args:
        envelopes: Survivor -> its envelope for this site.
        least: Sites that a sum is to have; of lanes with fewer, nothing is revealed.

    Raises:
        WireError: An envelope is missing.
        RefusedError: One does not open, or has the wrong size (`false_envelope`): its site has sealed it wrongly, or
            the coordinator has changed it or the lanes of that site.
    """
    shares: dict[tuple[str, SeedName], np.ndarray] = {}
    for sender in sites_among(survivors):
        dealt = lanes_of(sender, lanes, survivors)
        names = seed_names(sender, dealt)
        if sender not in envelopes:
            raise WireError(f"the envelope of site {sender} for this site is missing")
        key = _envelope_key(cohort, agree(private_key, cohort.run_keys[sender]), sender, site)
        try:
            content = np.frombuffer(open_envelope(key, envelopes[sender], outside=_what_is_dealt(dealt)), np.uint8)
        except WireError as error:
            raise _false_envelope(sender, str(error)) from error
        if content.size != SEED_BYTES * len(names):
            raise _false_envelope(sender, f"it holds {content.size} bytes, not {SEED_BYTES * len(names)}")
        shares.update(zip(((sender, name) for name in names), content.reshape(-1, SEED_BYTES), strict=True))
    wanted = _revealed(lanes, survivors, least)
    return np.stack([shares[one] for one in wanted]) if wanted else np.empty((0, SEED_BYTES), np.uint8)


def _false_envelope(sender: str, problem: str) -> RefusedError:
    return RefusedError(
        f"the shares that site {sender} has sealed for this site cannot be used: {problem}. Nothing was unmasked",
        "If this is a round of a run, let the coordinating site close it without a result (nnUNetv2_fed_admin "
        "abandon RUN); planning that goes no further needs a new federation. If it happens again, "
        f"site {sender} is broken or hostile (nnUNetv2_fed_admin revoke {sender}), or the coordinator is.",
        code="false_envelope",
    )


def _revealed(lanes: Iterable[Lane], survivors: Survivors, least: int) -> list[tuple[str, SeedName]]:
    """List (site, seed) of all that is rebuilt, in the order of the answers."""
    return [
        (site, name)
        for lane in unmasked_lanes(lanes, survivors, least)
        for site in survivors[lane.name]
        for name in revealed_names(lane, site, survivors)
    ]


@dataclass(frozen=True)
class Masks:
    """The masks that the sum of a lane's vectors still has."""

    plus: tuple[bytes, ...] = field(repr=False)
    """Seeds whose streams were added,"""
    minus: tuple[bytes, ...] = field(repr=False)
    """and subtracted."""


class SharesDoNotFitError(RefusedError):
    """The answers do not rebuild the seeds that the survivors have committed themselves to."""


def rebuild_seeds(
    cohort: Cohort,
    lanes: Sequence[Lane],
    survivors: Survivors,
    answers: Mapping[str, np.ndarray],
    commitments: Mapping[str, np.ndarray],
    *,
    least: int,
) -> tuple[dict[str, Masks], tuple[str, ...]]:
    """Rebuild, at the coordinator, the seeds that the sums still contain.

    Any t honest answers give the same. A seed that matches its commitment is the right one, whatever set of answers it
    comes from; the others are looked for in further sets. After those that leave each answer out in turn, a set is
    tried with one of the missing seeds first: honest answers give that one too. If all answers to it lie on one
    polynomial, every set gives the same, and the search ends: its owner has dealt another seed than it has committed
    itself to.

    Args:
        answers: Site -> the result of its `reveal_shares`; at least t of them.
        commitments: Survivor -> its commitments.

    Returns:
        Lane -> its masks, and the names of sites whose shares are false, as far as that shows.

    Raises:
        SharesDoNotFitError: No t of the answers that were tried fit; it names the sites whose seeds are not rebuilt.
    """
    wanted = _revealed(lanes, survivors, least)
    expected = _expected_commitments(wanted, lanes, survivors, commitments)
    if len(answers) < cohort.threshold:
        raise AggregationError(f"{len(answers)} answers, it takes {cohort.threshold}")
    seeds, used_for, missing = _fitting_seeds(
        {cohort.point(site): answers[site] for site in sorted(answers)}, expected, cohort.threshold
    )
    if len(missing):
        owners = sorted({wanted[row][0] for row in missing})
        raise SharesDoNotFitError(
            f"the shares of {', '.join(sorted(answers))} do not rebuild the seeds of {', '.join(owners)}: one of them "
            "has sent false shares, or these sites have dealt false ones",
            "The round waits for further answers; nnUNetv2_fed_admin abandon ends it.",
            code="shares_do_not_fit",
        )
    false = tuple(
        site
        for site in sorted(answers)
        if any(not _lies_on(part, cohort.point(site), answers[site][rows]) for part, rows in used_for)
    )
    return _masks_of(dict(zip(wanted, map(bytes, seeds), strict=True)), lanes, survivors, least), false


def _fitting_seeds(
    answers: Mapping[int, np.ndarray], expected: np.ndarray, threshold: int
) -> tuple[np.ndarray, list[tuple[Mapping[int, np.ndarray], np.ndarray]], np.ndarray]:
    """Look for sets of answers, point -> shares, that give seeds with the expected commitments.

    Returns:
        The seeds; the sets that gave them, each as its answers to some rows and these rows; the rows without a seed.
    """
    seeds, missing = np.zeros_like(expected), np.arange(len(expected))
    used_for: list[tuple[Mapping[int, np.ndarray], np.ndarray]] = []

    def tried(points: Iterable[int], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = shamir.combine({point: answers[point][rows] for point in points})
        return found, (commitments_to(map(bytes, found)) == expected[rows]).all(axis=1)

    for number, points in enumerate(_subsets(tuple(answers), threshold)):
        if number >= len(answers) and not tried(points, missing[:1])[1].all():
            continue
        found, fits = tried(points, missing)
        rows, missing = missing[fits], missing[~fits]
        seeds[rows] = found[fits]
        if len(rows):
            used_for.append(({point: answers[point][rows] for point in points}, rows))
        first = {point: answers[point][missing[:1]] for point in answers}
        if all(_lies_on({point: first[point] for point in points}, other, first[other]) for other in first):
            break  # also if nothing is missing
    return seeds, used_for, missing


def _lies_on(shares: Mapping[int, np.ndarray], point: int, values: np.ndarray) -> bool:
    """Tell whether values at a point are those of the polynomials through some shares."""
    return point in shares or np.array_equal(shamir.combine_at(shares, point), values)


def _subsets(points: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    """Yield subsets to rebuild seeds from: at first those that leave each point out in turn, then others."""
    for begin in range(len(points)):
        yield tuple((*points[begin:], *points[:begin])[:size])
    yield from islice(combinations(points, size), _SUBSETS_TRIED)


def _expected_commitments(
    wanted: Sequence[tuple[str, SeedName]],
    lanes: Sequence[Lane],
    survivors: Survivors,
    commitments: Mapping[str, np.ndarray],
) -> np.ndarray:
    rows = {
        (site, name): row
        for site in sites_among(survivors)
        for name, row in zip(
            seed_names(site, lanes_of(site, lanes, survivors)), commitments[site].reshape(-1, SEED_BYTES), strict=True
        )
    }
    return np.array([rows[one] for one in wanted], np.uint8).reshape(-1, SEED_BYTES)


def _masks_of(
    seeds: Mapping[tuple[str, SeedName], bytes], lanes: Sequence[Lane], survivors: Survivors, least: int
) -> dict[str, Masks]:
    masks = {}
    for lane in unmasked_lanes(lanes, survivors, least):
        plus: list[bytes] = []
        minus: list[bytes] = []
        for site in survivors[lane.name]:
            for name in revealed_names(lane, site, survivors):
                (plus if site <= name[1] else minus).append(seeds[site, name])
        masks[lane.name] = Masks(tuple(plus), tuple(minus))
    return masks


def unmasking(masks: Masks, lane: Lane, begin: int = 0) -> Keystreams:
    """Return streams that take the masks from a sum, part by part."""
    return Keystreams(masks.minus, masks.plus, WORDS[lane.dtype], begin)


def unmask_(total: np.ndarray, lane: Lane, masks: Masks) -> None:
    """Take the masks from a sum of masked vectors in place."""
    unmasking(masks, lane).apply_(total)


def check_sum(lane: Lane, check_words: np.ndarray, weights: Mapping[str, int], sites: Sequence[str]) -> None:
    """Raise AggregationError unless an unmasked sum's check words fit its sites.

    Args:
        weights: Site -> its weight.
        sites: Those whose vectors were added.
    """
    modulus = 1 << (8 * WORDS[lane.dtype].itemsize)
    expected = [len(sites) % modulus, sum(weights[site] for site in sites) % modulus, 0, 0]
    if [int(word) for word in check_words] != expected:
        raise AggregationError(
            f"the masks of {lane.name} do not cancel out: a site has not masked as agreed. Nothing was added"
        )
