"""Secret sharing, masks, keys, fixed point."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2.federated.errors import WireError
from nnunetv2.federated.privacy.secure_aggregation import fixed_point, key_agreement, masking, shamir


# -------------------------------------------------------------------------------------------------- secret sharing
def test_any_four_of_five_shares_rebuild_a_secret_and_no_three_do():
    secrets = np.random.default_rng(0).integers(0, 256, (3, 32)).astype(np.uint8)
    shares = shamir.split(secrets, 4, [1, 2, 3, 4, 5])
    for four in itertools.combinations(shares, 4):
        assert np.array_equal(shamir.combine({point: shares[point] for point in four}), secrets)
    for three in itertools.combinations(shares, 3):
        assert not np.array_equal(shamir.combine({point: shares[point] for point in three}), secrets)


def test_a_further_share_follows_from_enough_others():
    secrets = np.arange(64, dtype=np.uint8).reshape(2, 32)
    shares = shamir.split(secrets, 3, [1, 2, 3, 7])
    three = {point: shares[point] for point in (1, 2, 3)}
    assert np.array_equal(shamir.combine_at(three, 7), shares[7])


@settings(deadline=None)
@given(
    st.binary(min_size=32, max_size=32), st.integers(1, 64).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))
)
def test_sharing_is_undone(secret, sizes):
    number, threshold = sizes
    secrets = np.frombuffer(secret, np.uint8).reshape(1, 32)
    shares = shamir.split(secrets, threshold, range(1, number + 1))
    last = dict(sorted(shares.items())[-threshold:])
    assert np.array_equal(shamir.combine(last), secrets)


@pytest.mark.parametrize(("threshold", "points"), [(3, [1, 2]), (1, [0]), (2, [1, 1]), (1, [256]), (0, [1])])
def test_impossible_sharings_are_refused(threshold, points):
    with pytest.raises(ValueError, match="points"):
        shamir.split(np.zeros((1, 32), np.uint8), threshold, points)


# ------------------------------------------------------------------------------------------------------------ masks
@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<u8"])
def test_masks_are_undone_part_by_part(dtype):
    words = np.arange(200_001).astype(dtype)
    masked = words.copy()
    masking.apply_masks_(masked, plus=[b"a" * 32, b"b" * 32], minus=[b"c" * 32])
    assert (masked != words).mean() > 0.99
    for begin, end in ((150_000, 200_001), (0, 1), (1, 70_007), (70_007, 150_000)):
        part = masked[begin:end]
        masking.apply_masks_(part, plus=[b"c" * 32], minus=[b"a" * 32, b"b" * 32], begin=begin)
    assert np.array_equal(masked, words)


def test_the_stream_is_aes_256_in_counter_mode():
    # The empty counter block under a key of zeros: FIPS 197's cipher, first block of the key stream.
    words = np.zeros(2, "<u8")
    masking.apply_masks_(words, plus=[bytes(32)], minus=[])
    assert words.tobytes().hex() == "dc95c078a2408989ad48a21492842087"


def test_a_seed_of_another_size_is_refused():
    with pytest.raises(ValueError, match="32 bytes"):
        masking.Keystreams([b"short"], [], np.dtype("<u4"))


# ------------------------------------------------------------------------------------------------------------- keys
def test_two_sites_agree_on_keys_and_purposes_differ():
    first, second = key_agreement.generate_private_key(), key_agreement.generate_private_key()
    one = key_agreement.agree(first, key_agreement.public_key_of(second))
    other = key_agreement.agree(second, key_agreement.public_key_of(first))
    assert key_agreement.derive_key(one, b"a", b"b") == key_agreement.derive_key(other, b"a", b"b")
    assert key_agreement.derive_key(one, b"a", b"b") != key_agreement.derive_key(one, b"ab")


@pytest.mark.parametrize("public", [bytes(32), b"short"])
def test_a_key_with_which_everybody_knows_the_secret_is_refused(public):
    with pytest.raises(WireError, match="X25519"):
        key_agreement.agree(key_agreement.generate_private_key(), public)


def test_a_changed_envelope_does_not_open():
    key = b"k" * 32
    envelope = key_agreement.seal_envelope(key, b"content", outside=b"label")
    assert key_agreement.open_envelope(key, envelope, outside=b"label") == b"content"
    for changed, label in ((envelope[:-1] + b"\0", b"label"), (envelope, b"other"), (b"", b"label")):
        with pytest.raises(WireError, match="does not open"):
            key_agreement.open_envelope(key, changed, outside=label)


# ------------------------------------------------------------------------------------------------------ fixed point
def as_words(values, weight, bits, exponent):
    out = np.empty(values.size, np.uint32)
    fixed_point.encode_weights_(values, weight, weight_bits=bits, exponent=exponent, out=out)
    return out


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=16), st.floats(1e-6, 100), st.integers(0, 2**32))
def test_the_mean_of_weights_is_within_half_a_step_per_site(weights, scale, seed):
    rng = np.random.default_rng(seed)
    sites = [(rng.normal(0, scale, 50)).astype(np.float32) for _ in weights]
    largest = max(float(np.abs(one).max()) for one in sites)
    exponent, bits = fixed_point.weight_exponent(largest), sum(weights).bit_length()
    total = np.zeros(50, np.uint32)
    for values, weight in zip(sites, weights, strict=True):
        total += as_words(values, weight, bits, exponent)
    mean = fixed_point.decode_weights(total, sum(weights), weight_bits=bits, exponent=exponent)
    exact = sum(values.astype(np.float64) * weight for values, weight in zip(sites, weights, strict=True)) / sum(
        weights
    )
    step = 2.0 ** -(31 - bits - exponent) / sum(weights)
    assert np.abs(mean - exact).max() <= step * (len(weights) / 2 + 1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 8.0, -8.0])
def test_what_has_grown_too_much_in_a_round_is_refused(value):
    with pytest.raises(fixed_point.DivergedError, match="nothing was sent"):
        as_words(np.array([0.5, value], np.float32), 3, bits=7, exponent=3)


def test_the_largest_values_of_the_most_sites_do_not_overflow():
    weights = [100_000] * 64
    bits, below = sum(weights).bit_length(), np.nextafter(np.float32(8), np.float32(0))
    for sign in (1, -1):
        total = sum(as_words(np.array([sign * below]), one, bits, 3).astype(np.uint64) for one in weights)
        words = (total % 2**32).astype(np.uint32)
        mean = fixed_point.decode_weights(words, sum(weights), weight_bits=bits, exponent=3)
        assert mean[0] == pytest.approx(sign * 8, rel=1e-3)


def test_changes_are_cut_to_their_range_and_what_was_sent_is_known():
    values = np.array([0.01, -0.02, 5.0, -5.0, 0.0], np.float32)
    out = np.empty(5, np.uint16)
    sent = fixed_point.encode_changes_(values, 10, weight_bits=6, exponent=-3, out=out)
    assert np.abs(sent[:2] - values[:2]).max() <= 2.0 ** -(15 - 6 + 3) / 10
    assert sent[2] == -sent[3] == pytest.approx(0.125, rel=0.01)
    total = out + out + out
    mean = fixed_point.decode_changes(total, 30, weight_bits=6, exponent=-3)
    assert np.allclose(mean, sent, rtol=1e-6)


@given(st.lists(st.tuples(st.floats(-1000, 1000), st.integers(1, 100_000)), min_size=1, max_size=64))
def test_the_mean_of_figures_is_exact_to_a_millionth(figures):
    total = sum(fixed_point.encode_figure(value, weight) for value, weight in figures) % 2**64
    weights = sum(weight for _, weight in figures)
    exact = sum(value * weight for value, weight in figures) / weights
    assert abs(fixed_point.decode_figure(total, weights) - exact) <= 1e-6


@pytest.mark.parametrize("value", [np.nan, np.inf, 2.0**19])
def test_a_figure_that_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="finite"):
        fixed_point.encode_figure(value, 1)
