"""What the sites of a run share."""

from types import SimpleNamespace

import pytest
from fake_federation import SHAPES, make_plans, make_registration, make_settings

from nnunetv2.federated.aggregation.head_rows import split_entries
from nnunetv2.federated.errors import RefusedError, WireError
from nnunetv2.federated.exchanges.steps.registration import check_annotations, match_registrations, remarks_on_classes
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.keys import RegistrationKey
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


# ------------------------------------------------------------------------------------------------ different classes
UNION = {"background": 0, "liver": 1, "spleen": 2}
HEADS = {"encoder.weight": (4, 3), "decoder.seg_layers.0.weight": (3, 4), "decoder.seg_layers.0.bias": (3,)}
UNPLANNED = SimpleNamespace(has_contributed=lambda key, site: False)


def annotating(*names: str, trained: set[int] | None = None, **others) -> messages.Registration:
    """Return the registration of a site that annotates these classes."""
    plain = make_registration(shapes=HEADS, aliases={}, labels=UNION, **others)
    rows = {UNION[name] for name in names} | {0} if trained is None else trained
    tensors, _ = split_entries(plain.tensors, {}, [name for name in HEADS if "seg" in name], rows)
    data = plain.dataset_json.model_copy(update={"annotated_labels": ("background", *names)})
    return plain.model_copy(update={"dataset_json": data, "tensors": tensors})


def check(registration, labels="union"):
    check_annotations("A", registration, make_settings(labels=labels), UNPLANNED)


def test_a_site_trains_the_rows_of_its_classes_and_no_others():
    check(annotating("liver"))
    for trained in ({0}, {0, 1, 2}, {1}):
        with pytest.raises(WireError, match="must train the outputs of the classes that it annotates"):
            check(annotating("liver", trained=trained))


def test_a_site_sends_all_else_that_it_trains():
    honest = annotating("liver")
    first, *rest = honest.tensors
    greedy = honest.model_copy(update={"tensors": (first.model_copy(update={"only_received": True}), *rest)})
    with pytest.raises(WireError, match=r"site A does not want to send tensor encoder.weight"):
        check(greedy)
    plain = make_registration()
    first, *rest = plain.tensors
    with pytest.raises(WireError, match="does not want to send"):
        check(plain.model_copy(update={"tensors": (first.model_copy(update={"only_received": True}), *rest)}), "equal")


def test_classes_that_nobody_numbered_are_refused():
    with pytest.raises(WireError, match="annotates 'kidney', which is none of its labels"):
        annotated = annotating("liver")
        data = annotated.dataset_json.model_copy(update={"annotated_labels": ("background", "kidney")})
        check(annotated.model_copy(update={"dataset_json": data}))
    with pytest.raises(RefusedError, match="does not have the classes of all sites"):
        check(make_registration())
    with pytest.raises(RefusedError, match="planned for a federation whose sites annotate different classes"):
        check(annotating("liver"), "equal")


def test_the_operator_is_told_of_classes_of_too_few_sites():
    contributed = {"A": annotating("liver"), "B": annotating("liver", "spleen"), "C": annotating("liver")}
    match = match_registrations(contributed, make_settings(sites=("A", "B", "C"), labels="union"))
    assert match.annotated == {"A": (1,), "B": (1, 2), "C": (1,)}
    (line,) = remarks_on_classes(RegistrationKey("r"), contributed, match)
    assert "only B annotates 'spleen'" in line and "no common model" in line
    more = {**contributed, "C": annotating("liver", "spleen")}
    match = match_registrations(more, make_settings(sites=("A", "B", "C"), labels="union"))
    assert [*remarks_on_classes(RegistrationKey("r"), more, match)] == []
    assert match.coverage["A"][0] == match.coverage["A"][1]


def test_without_different_classes_a_match_is_what_it_was():
    match = match_registrations({"A": make_registration(), "B": make_registration()}, make_settings())
    assert not {"received", "annotated"} & match.model_dump(mode="json").keys()
    assert not any("only_received" in entry for entry in make_registration().model_dump(mode="json")["tensors"])
