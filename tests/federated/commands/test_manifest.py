"""What leaves a site is listed beforehand, and nothing else leaves where there is a list of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fake_federation import RUN, make_census, make_plans, make_registration, make_settings, make_weights, served

from nnunetv2.federated.commands import manifest
from nnunetv2.federated.errors import FederationError, NotAllowedError
from nnunetv2.federated.privacy import allow_list
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.document import TensorSpec, write_document
from nnunetv2.federated.protocol.keys import CensusKey

DATASET = {
    "channel_names": {"0": "CT", "1": "PET"},
    "labels": {"background": 0, "liver": 1, "tumour": [1, 2]},
    "regions_class_order": [1, 2],
    "numTraining": 7,
    "file_ending": ".nii.gz",
}
METRICS = ("val_losses", "dice_per_class_or_region")


def make_documents(**options) -> list[manifest.Leaving]:
    return [
        *manifest.planning_documents(DATASET, 7, plans=make_plans(), **options),
        *manifest.training_documents(make_registration(), metrics=METRICS, later_metrics=METRICS, num_classes=2),
    ]


def by_kind(kind: str, **options) -> list[manifest.Leaving]:
    return [document for document in make_documents(**options) if document.kind == kind]


@pytest.fixture
def with_list(tmp_path, monkeypatch):
    """Write a list, of these documents or given, and let the site use it."""

    def write(content: dict | None = None) -> Path:
        path = tmp_path / "allow.json"
        content = content or manifest.allow_list_of(make_documents(), None).model_dump(mode="json")
        path.write_text(json.dumps(content))
        monkeypatch.setenv("nnUNet_fed_allow", str(path))
        return path

    return write


# ------------------------------------------------------------------------------------------------------ the manifest
def test_sizes_are_those_of_the_documents(tmp_path):
    for document in make_documents():
        if document.kind != "failure_report":
            tensors = (
                np.zeros(spec.shape, {"F32": np.float32, "I64": np.int64}[spec.dtype])
                for spec in document.specs.values()
            )
            write_document(tmp_path / "file", document.message, document.specs, tensors)
            assert document.size == (tmp_path / "file").stat().st_size


def test_every_field_and_tensor_is_listed():
    text = "\n".join(manifest.describe(make_documents(), None))
    assert "This site has not joined a federation" in text
    for line in (
        "num_cases: 7",
        'labels: {"background": 0, "liver": 1, "tumour": [1, 2]}',
        "spacings: 7 values",
        "tensor coarse.1  I64[65536]  524,288 bytes",
        "tensor encoder.weight  F32[4, 3]  48 bytes",
        "3 tensors, 96 bytes:",
        "3 tensors, 96 bytes, the same as above",
        'dataset_json.file_ending: ".nii.gz"',
        "metrics: 2 values: val_losses",
        "earlier.metrics: 2 values: val_losses",
        "moments: 2 values of count, mean, m2",
        "message validation",
        "message failure_report",
    ):
        assert line in text, line
    assert "extrema" not in text.replace("share_extrema", "")


def test_extrema_are_listed_where_they_are_asked_for():
    assert "extrema: 2 values" in "\n".join(manifest.describe(make_documents(share_extrema=True), None))


def test_every_kind_of_document_that_a_site_sends_is_in_the_manifest():
    sent = {"census", "coarse_summary", "fine_summary", "plans_report", "registration", "update", "validation"}
    assert {document.kind for document in make_documents()} == sent | {"failure_report"}


# ---------------------------------------------------------------------------------------------------- the allow-list
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
        assert federation.state.store.load_events("failure") == []
        assert federation.state.registry.get(CensusKey()) is None
        assert credential.site == "A"


# ----------------------------------------------------------------------------------------------------- the command
def test_the_command_reads_the_site_s_own_files_and_sends_nothing(roots, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")

    from tiny_dataset import NAME, make_dataset_json, make_plans

    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    folder = roots["nnUNet_preprocessed"] / NAME
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(make_dataset_json()))
    assert manifest.main([NAME]) == 0  # nothing is planned yet
    assert "message coarse_summary" in (before := capsys.readouterr().out) and "registration" not in before
    assert "There are no plans yet. That planning sends them at its end" in before and f"-d {NAME} --no_pp" in before
    with pytest.raises(FederationError, match="plan first"):
        manifest.main([NAME, "3d_fullres"])
    (folder / "nnUNetPlans.json").write_text(json.dumps(make_plans()))
    target = tmp_path / ".config" / "nnunet" / "federated_allow.json"
    assert manifest.main(["998", "3d_fullres", "--write-allow-list", str(target)]) == 0
    text = capsys.readouterr().out
    assert "tensor encoder.stages.0.0.convs.0.conv.weight  F32[4, 1, 3, 3, 3]  432 bytes" in text
    assert "all_modules" not in text.partition("every round")[2]  # aliases travel once
    allowed = allow_list.load_allow_list()
    assert allowed.documents["update"].tensors == ("decoder.*", "encoder.*")
    with pytest.raises(FederationError, match="without a federation"):
        manifest.main([NAME, "-tr", "nnUNetTrainer"])
    assert list(roots["nnUNet_results"].iterdir()) == []
