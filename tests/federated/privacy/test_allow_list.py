"""Nothing leaves a site but what its list allows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fake_federation import RUN, make_census, make_settings, make_weights, served
from planned_documents import by_kind, make_documents

from nnunetv2.federated.errors import FederationError, NotAllowedError
from nnunetv2.federated.privacy import allow_list
from nnunetv2.federated.privacy.disclosure import allow_list_of
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.document import TensorSpec
from nnunetv2.federated.protocol.keys import CensusKey


@pytest.fixture
def with_list(tmp_path, monkeypatch):
    """Write a list, of these documents or given, and let the site use it."""

    def write(content: dict | None = None) -> Path:
        path = tmp_path / "allow.json"
        content = content or allow_list_of(make_documents(), coordinator=None).model_dump(mode="json")
        path.write_text(json.dumps(content))
        monkeypatch.setenv("nnUNet_fed_allow", str(path))
        return path

    return write


def check(message, tensors=None, url="http://there"):
    specs = {name: TensorSpec.of(values) for name, values in (tensors or {}).items()}
    allow_list.check_document(message, specs, url=url)


def test_without_a_list_everything_may_leave(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    check(make_census())


def test_what_the_manifest_lists_is_allowed(with_list):
    with_list()
    for document in make_documents():
        if document.kind != "failure_report":
            allow_list.check_document(document.message, document.specs, url="http://there")
    check(messages.Update(metrics={"val_losses": float("nan")}), make_weights(0))
    allow_list.check_body("failure_report", make_documents()[-1].message, url="http://there")


@pytest.mark.parametrize(
    ("message", "tensors", "complaint"),
    [
        (messages.Update(metrics={"patient": 1.0}), {}, "field metrics.patient of a message of kind update"),
        (messages.Update(), {"secret.weight": np.zeros(3, np.float32)}, "tensor secret.weight"),
        (messages.Update(), {"encoder.weight": np.zeros(1 << 20, np.float32)}, "a message of kind update with 4"),
        (by_kind("coarse_summary", share_extrema=True)[0].message, {}, "field extrema"),
        (messages.WantedBins(bins=((1,),)), {}, "a message of kind wanted_bins"),
    ],
)
def test_what_it_does_not_list_is_refused_by_name(with_list, message, tensors, complaint):
    path = with_list()
    with pytest.raises(NotAllowedError, match=complaint) as info:
        check(message, tensors)
    assert str(path) in str(info.value) and "nothing was sent" in str(info.value)


def test_a_list_is_for_one_coordinator(with_list):
    with_list({"version": 1, "coordinator": "https://here/", "documents": {"census": {"fields": ["*"]}}})
    check(make_census(), url="https://here")
    with pytest.raises(NotAllowedError, match="the list is for https://here"):
        check(make_census(), url="https://elsewhere")


@pytest.mark.parametrize("content", ["", "{}", '{"version": 1, "documents": {}, "unknown": 1}', '{"version": 2}'])
def test_a_list_that_cannot_be_read_lets_nothing_out(with_list, content):
    with_list().write_text(content)
    with pytest.raises(FederationError, match="cannot be read, so nothing leaves"):
        check(make_census())


def test_a_list_that_is_named_must_be_there(monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_fed_allow", str(tmp_path / "none.json"))
    with pytest.raises(FederationError, match="cannot be read"):
        check(make_census())


def test_the_client_sends_nothing_that_is_not_allowed(with_list, tmp_path):
    with served(tmp_path / "federation", make_settings()) as federation:
        credential = federation.credential("A")
        with_list({"version": 1, "documents": {"census": {"fields": ["num_cases", "labels.*", "share_extrema"]}}})
        with federation.client("A") as client:
            with pytest.raises(NotAllowedError, match="field channel_names.0"):
                client.contribute(CensusKey(), make_census())
            client.report_failure(RUN, 0, "ValueError")  # not on the list either: kept back, without an error
        assert federation.coordinator.store.load_events("failure") == []
        assert federation.coordinator.book.get(CensusKey()) is None
        assert credential.site == "A"
