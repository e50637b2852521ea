"""Datasets that go together, and the count of all cases."""

import pytest
from fake_federation import LABELS, make_census, make_settings

from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.steps.census import check_same_dataset, pool_census
from nnunetv2.federated.protocol import messages


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"labels": {"background": 0, "liver": 2}}, "labels.liver is 1 at A and 2 at B"),
        ({"labels": {"background": 0, "liver": 1, "tumour": 2}}, "labels.tumour is absent at A and 2 at B"),
        ({"channel_names": {"0": "MR"}}, 'channel_names.0 is "CT" at A and "MR" at B'),
        ({"channel_names": {"0": "CT", "1": "PET"}}, 'channel_names.1 is absent at A and "PET" at B'),
        ({"regions_class_order": (1,)}, r"regions_class_order is null at A and \[1\] at B"),
    ],
)
def test_datasets_that_differ_are_refused(change, complaint):
    other = messages.Census(**{**make_census().model_dump(), **change})
    with pytest.raises(RefusedError, match=complaint) as info:
        pool_census({"A": make_census(), "B": other}, make_settings())
    assert info.value.code == "datasets_differ" and "dataset.json" in info.value.remedy
    assert ("--labels union" in info.value.remedy) == ("channel_names" not in change)


def test_cases_are_added_up():
    pooled = pool_census({"A": make_census(3), "B": make_census(4)}, make_settings())
    assert pooled.num_cases == 7
    assert pooled.model_dump_json() == '{"protocol":1,"kind":"pooled_census","num_cases":7}'


def test_classes_of_all_sites_are_numbered_where_they_may_differ():
    censuses = {
        "A": make_census(3, labels={"background": 0, "liver": 1}),
        "B": make_census(4, labels={"background": 0, "tumour": 1, "liver": 2}),
    }
    pooled = pool_census(censuses, make_settings(labels="union"))
    assert pooled.num_cases == 7
    assert pooled.labels == {"background": 0, "tumour": 1, "liver": 2}
    assert pooled.annotators == {"tumour": 1, "liver": 2}


def test_channels_have_to_agree_all_the_same():
    other = messages.Census(num_cases=1, channel_names={"0": "MR"}, labels=LABELS)
    with pytest.raises(RefusedError, match="channel_names"):
        pool_census({"A": make_census(), "B": other}, make_settings(labels="union"))


def test_the_order_of_labels_matters_for_regions_only():
    labels = {"background": 0, "whole": (1, 2), "core": (2,)}
    turned = {"background": 0, "core": (2,), "whole": (1, 2)}
    plain = {"A": make_census(labels=LABELS), "B": make_census(labels=dict(reversed(LABELS.items())))}
    check_same_dataset(plain)
    regions = {
        site: messages.Census(num_cases=1, channel_names={"0": "CT"}, labels=order, regions_class_order=(1, 2))
        for site, order in (("A", labels), ("B", turned))
    }
    with pytest.raises(RefusedError, match="order of labels"):
        check_same_dataset(regions)
