"""Everything that leaves a site is listed beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from planned_documents import make_documents

from nnunetv2.federated.commands import manifest
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.privacy import allow_list
from nnunetv2.federated.protocol.document import DTYPES, write_document


@pytest.mark.parametrize("is_masked", [False, True])
def test_sizes_are_those_of_the_documents(tmp_path, is_masked):
    for document in make_documents(is_masked=is_masked):
        if document.kind != "failure_report":
            tensors = (np.zeros(spec.shape, DTYPES[spec.dtype]) for spec in document.specs.values())
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
    masked = {"census", "masked_update", "confirmation", "unmasking_shares", "plans_report", "registration", "update"}
    assert {document.kind for document in make_documents(is_masked=True)} == masked | {"failure_report"}


def test_what_is_masked_is_said_to_be(capsys):
    text = "\n".join(manifest.describe(make_documents(is_masked=True), None))
    for line in (
        "the other sites see: nothing but the sum of all sites",
        "tensor masked.sum  U64[",
        "with --geometry quantiles: masked numbers",
        "exactly at the wanted ranks",
        "tensor masked.weights  U32[",
        "message unmasking_shares",
    ):
        assert line in text, line
    assert "moments" not in text and "spacings:" not in text


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
