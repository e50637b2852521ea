"""What the sites of a run share."""

import pytest
from fake_federation import SHAPES, make_plans, make_registration, make_settings

from nnunetv2.federated.errors import RefusedError, WireError
from nnunetv2.federated.exchanges.steps.registration import match_registrations
from nnunetv2.federated.protocol.messages import Registration, TensorEntry
from nnunetv2.federated.protocol.strict_json import decode_json, encode_json


def test_a_match_says_what_is_shared_and_not_how_many_cases_a_site_has():
    contributed = {"A": make_registration(1), "B": make_registration(3)}
    match = match_registrations(contributed, make_settings())
    assert match.weights == {"A": 1.0, "B": 1.0} and match.weighting == "cases"
    assert set(match.shared) == set(SHAPES)
    assert set(match.initial_owner.values()) == {"B"}
    assert match.coverage == {"A": (24, 24), "B": (24, 24)}
    assert match.num_epochs == 3
    assert match_registrations(contributed, make_settings(weighting="uniform")).weighting == "uniform"


def test_networks_that_share_nothing_are_refused():
    other = make_registration(shapes={"something.weight": (3,)}, aliases={})
    with pytest.raises(RefusedError, match="site A shares only 0 of .*24 parameters") as info:
        match_registrations({"A": make_registration(), "B": other}, make_settings())
    assert info.value.code == "nothing_shared"


def test_plans_are_compared_where_a_trainer_wants_them_equal():
    different = make_plans(transpose_forward=[0, 1, 2])
    match_registrations({"A": make_registration(), "B": make_registration(plans=different)}, make_settings())
    with pytest.raises(RefusedError, match="transpose_forward is not the same at A and at B"):
        match_registrations(
            {"A": make_registration(), "B": make_registration(plans=different, equal=True)}, make_settings()
        )


def test_a_network_that_no_match_could_count_is_refused_on_arrival():
    """Two sites that claim such a one would share it, and the registration of all could never close."""
    huge = make_registration(aliases={})
    entries = [TensorEntry(name=name, dtype="F32", shape=(2**31, 2**31)) for name in ("a.weight", "b.weight")]
    huge = huge.model_copy(update={"tensors": tuple(entries)})
    with pytest.raises(WireError, match="no network is that large"):
        decode_json(Registration, encode_json(huge))
