"""A site that requires secure sums sends nothing in clear, whatever the coordinator says."""

import pytest
from fake_federation import RUN, make_census, make_registration, make_settings

from nnunetv2.federated.errors import FederationError, NotAllowedError
from nnunetv2.federated.exchanges.steps import STEPS
from nnunetv2.federated.privacy.require_secure import check_message, check_settings, required_k
from nnunetv2.federated.protocol import keys, messages

VARIABLE = "nnUNet_fed_require_secure"


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("variable", "promised", "required"),
    [(None, None, None), (None, 4, 4), ("4", None, 4), ("4", 3, 4), ("3", 5, 5), (" 64 ", None, 64)],
)
def test_the_stricter_of_both_holds(monkeypatch, variable, promised, required):
    if variable is not None:
        monkeypatch.setenv(VARIABLE, variable)
    assert required_k(promised) == required


@pytest.mark.parametrize("text", ["", "yes", "2", "0", "-3", "3.0", "٣", "99999"])
def test_anything_else_than_a_number_lets_nothing_out(monkeypatch, text):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(FederationError, match="must be a whole number from 3 on.*nothing leaves this site"):
        required_k()


@pytest.mark.parametrize(
    ("secure", "promised", "found"),
    [(None, 3, "sums in clear, .* 3 sites or more .as when it joined, 3"), ({"k": 3}, 4, "sums from 3 sites on, .* 4")],
)
def test_a_federation_that_protects_less_is_refused(secure, promised, found):
    with pytest.raises(NotAllowedError, match=found):
        check_settings(make_settings(sites=("A", "B", "C"), secure=secure), promised)


@pytest.mark.parametrize(("secure", "promised"), [(None, None), ({"k": 3}, None), ({"k": 4}, 4), ({"k": 5}, 4)])
def test_a_federation_that_protects_enough_is_accepted(secure, promised):
    check_settings(make_settings(sites=("A", "B", "C"), secure=secure), promised)


STATISTICS = messages.CoarseSummary(
    spacings=((1.0, 1.0, 1.0),),
    shapes=((8, 8, 8),),
    relative_sizes=(1.0,),
    moments=(messages.ChannelMoments(count=1, mean=0.0, m2=0.0),),
    promotes_to_float64=False,
)
CLEAR = [
    (keys.RoundKey(RUN, 0), messages.Update()),
    (keys.ValidationKey(RUN, 0), messages.Validation(tp=(1.0,), fp=(1.0,), fn=(1.0,))),
    (keys.CoarseKey(), STATISTICS),
    (keys.FineKey(), messages.FineSummary(bins=((1,),))),
]


@pytest.mark.parametrize(("key", "message"), CLEAR, ids=lambda one: getattr(one, "kind", ""))
def test_what_shows_a_site_s_own_numbers_stays(monkeypatch, key, message):
    check_message(key, message, None)
    with pytest.raises(NotAllowedError, match=f"{key}: a message of kind {message.kind} would leave in clear"):
        check_message(key, message, 3)
    monkeypatch.setenv(VARIABLE, "4")
    with pytest.raises(NotAllowedError, match=f"{VARIABLE}=4"):
        check_message(key, message, None)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (keys.InitialKey(RUN), messages.Update()),
        (keys.CensusKey(), make_census()),
        (keys.RegistrationKey(RUN), make_registration()),
        (keys.PlansKey("nnUNetPlans"), messages.PlansReport(plans={})),
    ],
    ids=lambda one: getattr(one, "kind", ""),
)
def test_what_has_to_be_in_clear_leaves(key, message):
    check_message(key, message, 3)


SHOWS_NO_NUMBERS = {"census", "registration", "plans_report", "masked_update", "confirmation", "unmasking_shares"}
"""What sites also contribute: it is to be known in clear, or is masked."""


def test_every_contribution_was_judged():
    """A further message that shows a site's own numbers belongs into CLEAR."""
    contributed = {
        kind.model_fields["kind"].default
        for step in STEPS
        for kind in (step.contribution if isinstance(step.contribution, tuple) else (step.contribution,))
    }
    assert contributed == {message.kind for _, message in CLEAR} | SHOWS_NO_NUMBERS
