"""The five steps of secure aggregation, on plain values."""

import itertools
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2.federated.errors import AggregationError, RefusedError
from nnunetv2.federated.privacy.secure_aggregation import protocol, shamir
from nnunetv2.federated.privacy.secure_aggregation.key_agreement import generate_private_key, public_key_of
from nnunetv2.federated.privacy.secure_aggregation.protocol import CHECK_WORDS, WORDS, Cohort, Lane

K = 3


@dataclass
class Meeting:
    """A cohort, with the private keys of all its sites."""

    names: list
    exchange: str = "runs/r/rounds/0"
    private: dict = field(init=False)
    cohort: Cohort = field(init=False)

    def __post_init__(self):
        self.private = {name: generate_private_key() for name in self.names}
        self.cohort = self.of(self.exchange)

    def of(self, exchange, federation="f"):
        """Return the cohort in another exchange."""
        keys = {name: public_key_of(key) for name, key in self.private.items()}
        return Cohort(federation, exchange, keys, dict.fromkeys(self.names, bytes(32)))


def upload(cohort, private, site, lanes, vectors, weight=1):
    """Return what a site sends: lane -> masked words, and its shared keys."""
    held = [lane for lane in lanes if lane.name in vectors]
    shared = protocol.share_keys(cohort, site, private, held)
    masked = {}
    for lane in held:
        words = protocol.with_check_words(lane, weight)
        words[CHECK_WORDS:] = vectors[lane.name]
        protocol.mask_input_(words, lane, site, shared)
        masked[lane.name] = words
    return masked, shared


def check(meeting, lanes, survivors, *, site="s0", least=K, optional=()):
    """Check survivors at a site that has sent what they say of it."""
    sent = [name for name, sites in survivors.items() if site in sites]
    protocol.check_survivors(meeting.cohort, lanes, survivors, site=site, sent=sent, least=least, optional=optional)


def unmask(meeting, lanes, uploads, survivors, answering, least=K):
    """Take steps 3 and 4; return lane -> sum with its check words, and the sites with false shares."""
    answers = {}
    for site in answering:
        optional = [lane.name for lane in lanes]
        sent = uploads[site][0].keys()
        protocol.check_survivors(meeting.cohort, lanes, survivors, site=site, sent=sent, least=least, optional=optional)
        envelopes = {sender: uploads[sender][1].envelopes[site] for sender in protocol.sites_among(survivors)}
        answers[site] = protocol.reveal_shares(
            meeting.cohort, site, meeting.private[site], lanes, survivors, envelopes, least=least
        )
    return add_up(meeting, lanes, uploads, survivors, answers, least)


def add_up(meeting, lanes, uploads, survivors, answers, least=K):
    commitments = {site: uploads[site][1].commitments for site in protocol.sites_among(survivors)}
    masks, false = protocol.rebuild_seeds(meeting.cohort, lanes, survivors, answers, commitments, least=least)
    sums = {}
    for lane in lanes:
        if lane.name in masks:
            total = np.zeros(lane.length, WORDS[lane.dtype])
            for site in survivors[lane.name]:
                total += uploads[site][0][lane.name]
            protocol.unmask_(total, lane, masks[lane.name])
            sums[lane.name] = total
    return sums, false


@st.composite
def rounds(draw):
    """Draw sites, lanes with holders and widths, the lanes that each sends, and the sites that drop out."""
    number = draw(st.integers(3, 16))
    names = [f"s{i:02d}" for i in range(number)]
    lanes = []
    for index in range(draw(st.integers(1, 4))):
        holders = draw(st.sets(st.sampled_from(names), min_size=1))
        dtype = draw(st.sampled_from(sorted(WORDS)))
        lanes.append(Lane(f"lane{index}", tuple(sorted(holders)), dtype, draw(st.integers(0, 40)), b"reference"))
    most = number - protocol.threshold_of(number)
    dropped = draw(st.sets(st.sampled_from(names), max_size=most))
    silent = draw(st.sets(st.tuples(st.sampled_from(names), st.sampled_from([one.name for one in lanes])), max_size=3))
    return names, lanes, dropped, silent, draw(st.integers(0, 2**32))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(rounds())
def test_every_sum_of_enough_sites_is_exact_and_others_give_out_no_share(drawn):
    names, lanes, dropped, silent, seed = drawn
    rng = np.random.default_rng(seed)
    meeting = Meeting(names)
    uploads, plain = {}, {}
    for site in names:
        plain[site] = {
            lane.name: rng.integers(0, 2**63, lane.size).astype(np.uint64).astype(WORDS[lane.dtype])
            for lane in lanes
            if site in lane.holders and (site, lane.name) not in silent
        }
        uploads[site] = upload(meeting.cohort, meeting.private[site], site, lanes, plain[site], weight=7)
    survivors = {
        lane.name: tuple(site for site in names if site not in dropped and lane.name in plain[site]) for lane in lanes
    }
    if len(protocol.sites_among(survivors)) < max(K, meeting.cohort.threshold):
        with pytest.raises(RefusedError, match="cannot be"):
            check(meeting, lanes, survivors, site=names[0])
        return
    answering = rng.permutation(protocol.sites_among(survivors))[: meeting.cohort.threshold]
    sums, false = unmask(meeting, lanes, uploads, survivors, [str(site) for site in answering])
    assert not false
    open_lanes = [lane for lane in lanes if len(survivors[lane.name]) >= K]
    assert sorted(sums) == sorted(lane.name for lane in open_lanes)
    assert protocol.count_revealed(lanes, survivors, K) == sum(
        len(survivors[lane.name]) * (1 + len(lane.holders) - len(survivors[lane.name])) for lane in open_lanes
    )
    for lane in open_lanes:
        expected = np.zeros(lane.size, WORDS[lane.dtype])
        for site in survivors[lane.name]:
            expected += plain[site][lane.name]
        assert np.array_equal(sums[lane.name][CHECK_WORDS:], expected)
        protocol.check_sum(lane, sums[lane.name][:CHECK_WORDS], dict.fromkeys(names, 7), survivors[lane.name])


@pytest.fixture
def five():
    """Return five sites, one lane and their uploads."""
    meeting = Meeting(["a", "b", "c", "d", "e"])
    lane = Lane("w", tuple(meeting.names), "U32", 1000)
    rng = np.random.default_rng(0)
    plain = {site: {"w": rng.integers(0, 2**32, 1000).astype("<u4")} for site in meeting.names}
    uploads = {site: upload(meeting.cohort, meeting.private[site], site, [lane], plain[site]) for site in meeting.names}
    return meeting, lane, plain, uploads


def answers_of(meeting, lane, uploads, survivors, sites):
    return {
        site: protocol.reveal_shares(
            meeting.cohort,
            site,
            meeting.private[site],
            [lane],
            survivors,
            {sender: uploads[sender][1].envelopes[site] for sender in protocol.sites_among(survivors)},
            least=K,
        )
        for site in sites
    }


def test_any_set_of_answers_gives_the_same_sum(five):
    meeting, lane, _plain, uploads = five
    survivors = {"w": ("a", "b", "c", "e")}
    found = {
        bytes(unmask(meeting, [lane], uploads, survivors, sites)[0]["w"])
        for sites in itertools.permutations(survivors["w"], 4)
    }
    assert len(found) == 1


def test_a_masked_vector_shows_nothing_even_when_all_pair_seeds_are_known(five):
    _meeting, _lane, plain, uploads = five
    masked, shared = uploads["a"]
    known = {name: seed for name, seed in shared.seeds.items() if name != ("w", "a")}
    words = masked["w"].copy()
    protocol.apply_masks_(words, plus=[], minus=list(known.values()))  # a is below all others
    assert not np.isin(words[CHECK_WORDS:], plain["a"]["w"]).any()


def test_a_site_with_false_shares_is_named_and_others_do(five):
    meeting, lane, plain, uploads = five
    survivors = {"w": tuple(meeting.names)}
    answers = answers_of(meeting, lane, uploads, survivors, meeting.names)
    answers["b"] = answers["b"] ^ 1
    sums, false = add_up(meeting, [lane], uploads, survivors, answers)
    assert false == ("b",)
    assert np.array_equal(sums["w"][CHECK_WORDS:], sum((one["w"] for one in plain.values()), np.uint32(0)))


def test_false_shares_among_just_enough_answers_are_noticed(five):
    meeting, lane, _, uploads = five
    survivors = {"w": tuple(meeting.names)}
    answers = answers_of(meeting, lane, uploads, survivors, meeting.names[:4])
    answers["b"] = answers["b"] ^ 1
    with pytest.raises(protocol.SharesDoNotFitError, match="false shares"):
        add_up(meeting, [lane], uploads, survivors, answers)


def make_meeting(number: int, lanes=1):
    """Return so many sites, their lanes, uploads, survivors and answers."""
    meeting = Meeting([f"s{index:02d}" for index in range(number)])
    lanes = [Lane(f"w{index}", tuple(meeting.names), "U32", 4) for index in range(lanes)]
    vectors = {lane.name: np.zeros(4, np.uint32) for lane in lanes}
    uploads = {site: upload(meeting.cohort, meeting.private[site], site, lanes, vectors) for site in meeting.names}
    survivors = {lane.name: tuple(meeting.names) for lane in lanes}
    answers = {
        site: protocol.reveal_shares(
            meeting.cohort,
            site,
            meeting.private[site],
            lanes,
            survivors,
            {sender: one[1].envelopes[site] for sender, one in uploads.items()},
            least=K,
        )
        for site in meeting.names
    }
    return meeting, lanes, uploads, survivors, answers


def commit_falsely(uploads, site):
    commitments = uploads[site][1].commitments.copy()
    commitments[0] ^= 1
    masked, shared = uploads[site]
    uploads[site] = masked, replace(shared, commitments=commitments)


@pytest.fixture
def counted(monkeypatch):
    """Count the seeds that are rebuilt from a set of answers."""
    counts = []
    combine = shamir.combine
    monkeypatch.setattr(
        shamir, "combine", lambda shares: counts.append(len(next(iter(shares.values())))) or combine(shares)
    )
    return counts


def test_false_answers_are_survived_as_long_as_enough_are_honest():
    meeting, lanes, uploads, survivors, answers = make_meeting(8)
    rng = np.random.default_rng(0)
    for liars in itertools.combinations(meeting.names, 8 - meeting.cohort.threshold):
        invented = {site: rng.integers(0, 256, answers[site].shape, np.uint8) for site in liars}
        sent = {**answers, **invented}
        sums, false = add_up(meeting, lanes, uploads, survivors, sent)
        assert false == liars and not sums["w0"][CHECK_WORDS:].any()


def test_answers_that_are_false_here_and_there_are_survived_and_named():
    """No set of answers fits as a whole; each row has enough honest ones."""
    meeting, lanes, uploads, survivors, answers = make_meeting(5)
    for number, site in enumerate(("s00", "s02", "s04")):
        answers[site] = answers[site].copy()
        answers[site][number] ^= 1
    _, false = add_up(meeting, lanes, uploads, survivors, answers)
    assert false == ("s00", "s02", "s04")


def test_a_false_commitment_is_noticed_at_once(counted):
    meeting, lanes, uploads, survivors, answers = make_meeting(16, lanes=2)
    commit_falsely(uploads, "s03")
    with pytest.raises(protocol.SharesDoNotFitError, match=r"do not rebuild the seeds of s03: "):
        add_up(meeting, lanes, uploads, survivors, answers)
    assert sum(counted) < 3 * 16 * 2  # all seeds once, and one of them for each further answer


def test_false_answers_beside_a_false_commitment_do_not_take_long(counted):
    meeting, lanes, uploads, survivors, answers = make_meeting(16, lanes=2)
    commit_falsely(uploads, "s03")
    answers["s09"] = answers["s09"] ^ 1
    with pytest.raises(protocol.SharesDoNotFitError, match=r"do not rebuild the seeds of s03: "):
        add_up(meeting, lanes, uploads, survivors, answers)
    assert sum(counted) < 16 * 16 * 2 + 2100  # one seed for each further set


def test_masks_of_another_aggregate_do_not_cancel_out(five):
    meeting, lane, plain, uploads = five
    other = Lane(lane.name, lane.holders, lane.dtype, lane.size, b"another aggregate")
    uploads["c"] = upload(meeting.cohort, meeting.private["c"], "c", [other], plain["c"])
    survivors = {"w": tuple(meeting.names)}
    sums, _ = unmask(meeting, [lane], uploads, survivors, meeting.names)
    with pytest.raises(AggregationError, match="do not cancel"):
        protocol.check_sum(lane, sums["w"][:CHECK_WORDS], dict.fromkeys(meeting.names, 1), survivors["w"])


def test_no_seed_is_used_twice():
    meeting = Meeting(["a", "b", "c"])
    seen = set()
    for exchange, federation in itertools.product(("runs/r/rounds/0", "runs/r/rounds/1", "runs/q/rounds/0"), "fg"):
        for name, reference in (("w", b""), ("w", b"1"), ("v", b"")):
            lane = Lane(name, ("a", "b", "c"), "U32", 8, reference)
            cohort = meeting.of(exchange, federation)
            shared = protocol.share_keys(cohort, "a", meeting.private["a"], [lane])
            seen.update(shared.seeds.values())
    assert len(seen) == 3 * 2 * 3 * 3


def test_two_sites_have_the_same_seed_and_an_outsider_another_one():
    meeting, lane = Meeting(["a", "b", "c"]), Lane("w", ("a", "b", "c"), "U32", 8)
    seeds = {
        site: protocol.share_keys(meeting.cohort, site, meeting.private[site], [lane]).seeds for site in meeting.names
    }
    assert seeds["a"]["w", "b"] == seeds["b"]["w", "a"] != seeds["a"]["w", "c"]
    assert seeds["a"]["w", "a"] != seeds["b"]["w", "b"]


def test_an_envelope_of_another_exchange_does_not_open(five):
    meeting, lane, _, uploads = five
    later = meeting.of("runs/r/rounds/1")
    envelopes = {site: uploads[site][1].envelopes["a"] for site in meeting.names}
    with pytest.raises(RefusedError, match="site a has sealed .* does not open"):
        protocol.reveal_shares(
            later, "a", meeting.private["a"], [lane], {"w": tuple(meeting.names)}, envelopes, least=K
        )


def test_a_lane_that_is_named_for_another_one_opens_no_envelope():
    """Its seeds would be given out as those of the other, and a site's own seed with its seeds for all others."""
    meeting = Meeting(["a", "b", "c", "d"])
    lanes = [Lane(name, meeting.cohort.sites, "U64", 2) for name in ("earlier", "training", "w")]
    vectors = {"training": np.arange(2, dtype=np.uint64), "w": np.arange(2, dtype=np.uint64)}
    uploads = {
        site: upload(meeting.cohort, meeting.private[site], site, lanes, vectors) for site in meeting.cohort.sites
    }
    told = {"earlier": ("a", "b", "c"), "training": ("d",), "w": meeting.cohort.sites}  # all have sent training
    optional, sent = ["earlier", "training"], ["training", "w"]
    for site in ("a", "d"):
        envelopes = {sender: uploads[sender][1].envelopes[site] for sender in meeting.names}
        with pytest.raises(RefusedError, match="site a has sealed") as refused:
            protocol.reveal_shares(meeting.cohort, site, meeting.private[site], lanes, told, envelopes, least=K)
        assert refused.value.code == "false_envelope"
    with pytest.raises(RefusedError, match="with what it has sent"):
        protocol.check_survivors(meeting.cohort, lanes, told, site="a", sent=sent, least=K, optional=optional)


@pytest.mark.parametrize(
    "survivors",
    [
        {"w": ("a", "b", "c")},  # fewer than t
        {"w": ("b", "c", "d", "e")},  # without this site
        {"w": ("a", "a", "b", "c", "d")},
        {"w": ("a", "b", "c", "z")},
        {"x": ("a", "b", "c", "d")},
        {"w": ("b", "a", "c", "d")},
    ],
)
def test_survivors_that_cannot_be_are_refused(five, survivors):
    meeting, lane, _, _ = five
    with pytest.raises(RefusedError) as refused:
        check(meeting, [lane], survivors, site="a")
    assert refused.value.code == "survivors_implausible"


@pytest.mark.parametrize(("number", "code"), [(2, "cohort_too_small"), (65, "too_many_sites_for_secure")])
def test_cohorts_are_of_3_to_64_sites(number, code):
    with pytest.raises(RefusedError) as refused:
        Meeting([f"s{i}" for i in range(number)])
    assert refused.value.code == code


@pytest.mark.parametrize(("number", "threshold"), [(3, 3), (4, 3), (5, 4), (8, 6), (10, 7), (16, 11), (64, 43)])
def test_two_thirds_and_one_unmask(number, threshold):
    assert protocol.threshold_of(number) == threshold


def test_a_lane_that_every_site_sends_cannot_have_lost_a_site_alone():
    meeting = Meeting([f"s{number}" for number in range(5)])
    lanes = [Lane("w", meeting.cohort.sites, "U32", 4), Lane("loss", meeting.cohort.sites, "U64", 1)]
    everybody, some = meeting.cohort.sites, meeting.cohort.sites[:4]
    check(meeting, lanes, {"w": everybody, "loss": some}, optional=["loss"])
    for survivors in ({"w": some, "loss": everybody}, {"loss": everybody}):
        with pytest.raises(RefusedError, match="cannot be"):
            check(meeting, lanes, survivors, optional=["loss"])


@pytest.mark.parametrize(
    "loss",
    [("s0", "s1", "s2", "z"), ("s0", "s1", "s2", "s4"), ("s0", "s1", "s2", "s2"), ("s2", "s1", "s0")],
    ids=["nobody's name", "a site that does not hold it", "twice", "out of order"],
)
def test_a_lane_that_sites_may_leave_out_lets_nobody_in_who_makes_up_the_number(loss):
    """Three of five are too few; a fourth name in a lane that need not be whole must not make them enough."""
    meeting = Meeting([f"s{number}" for number in range(5)])
    lanes = [Lane("w", meeting.cohort.sites[:4], "U32", 4), Lane("loss", meeting.cohort.sites[:4], "U64", 1)]
    for survivors in ({"w": ("s0", "s1", "s2"), "loss": loss}, {"w": ("s0", "s1", "s2", "s3"), "loss": loss}):
        with pytest.raises(RefusedError, match="cannot be"):
            check(meeting, lanes, survivors, optional=["loss"])
    whole = {"w": ("s0", "s1", "s2", "s3"), "loss": ("s0", "s1", "s2")}
    check(meeting, lanes, whole, optional=["loss"])
    with pytest.raises(RefusedError, match="cannot be"):
        check(meeting, lanes, {**whole, "another": ("s0", "s1", "s2")}, optional=["loss"])


def test_where_more_sites_are_asked_for_than_unmask_fewer_are_refused():
    """Four of five unmask; a federation that sums from five sites on gives nothing for four."""
    meeting = Meeting([f"s{number}" for number in range(5)])
    lanes, four = [Lane("w", meeting.cohort.sites, "U32", 4)], meeting.cohort.sites[:4]
    check(meeting, lanes, {"w": four}, least=4)
    with pytest.raises(RefusedError, match="it takes 5 of"):
        check(meeting, lanes, {"w": four}, least=5)
    assert protocol.count_revealed(lanes, {"w": four}, 5) == 0
