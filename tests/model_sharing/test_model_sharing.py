"""Tests of exporting, installing and downloading models, and of archives that mean harm."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from trained_models import NAME, make_trained_models

from nnunetv2.model_sharing import entry_points
from nnunetv2.model_sharing.archive_check import ArchiveLimits, UnsafeArchiveError
from nnunetv2.model_sharing.model_download import download_and_install_from_url, download_file
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.model_sharing.model_import import install_model_from_zip_file

MODEL = f"{NAME}/nnUNetTrainer__nnUNetPlans__2d"


@pytest.fixture
def models(roots):
    return make_trained_models(roots, planned=["2d", "3d_fullres"])


@pytest.fixture
def exported(models, tmp_path):
    path = tmp_path / "out" / "model.zip"
    export_pretrained_model(NAME, str(path), folds=(0, 1))
    return path


def names_in(path):
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def write_zip(path, members):
    """Write a zip file; members are name -> content, or ZipInfo -> content."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def everything_below(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_an_export_holds_what_prediction_needs_and_no_predictions(exported):
    names = names_in(exported)
    for name in (
        "plans.json",
        "dataset.json",
        "dataset_fingerprint.json",
        "fold_0/checkpoint_final.pth",
        "fold_0/progress.png",
        "fold_1/validation/summary.json",
    ):
        assert f"{MODEL}/{name}" in names
    assert not [name for name in names if name.endswith((".npz", ".nii.gz", ".pkl"))]


def test_predictions_are_exported_on_request_without_probabilities(models, tmp_path):
    export_pretrained_model(NAME, str(tmp_path / "m.zip"), ["2d"], folds=(0, 1), export_crossval_predictions=True)
    names = names_in(tmp_path / "m.zip")
    assert f"{MODEL}/fold_0/validation/case_00.nii.gz" in names
    assert not [name for name in names if name.endswith((".npz", ".pkl"))]


def test_information_on_the_best_configuration_is_exported_without_ensembles(models, tmp_path):
    for name in ("inference_information.json", "inference_instructions.txt"):
        (models / name).write_text("{}")
    export_pretrained_model(NAME, str(tmp_path / "m.zip"), ["2d"], folds=(0, 1))
    names = names_in(tmp_path / "m.zip")
    assert f"{NAME}/inference_information.json" in names and f"{NAME}/inference_instructions.txt" in names


def test_ensembles_are_exported_if_all_their_members_are(models, tmp_path):
    one = "nnUNetTrainer__nnUNetPlans__2d"
    for other in ("3d_fullres", "3d_lowres"):
        folder = models / "ensembles" / f"ensemble___{one}___nnUNetTrainer__nnUNetPlans__{other}___0_1"
        folder.mkdir(parents=True)
        for name in ("summary.json", "postprocessing.pkl", "case_00.nii.gz"):
            (folder / name).write_bytes(b"{}")
    export_pretrained_model(NAME, str(tmp_path / "m.zip"), folds=(0, 1))
    found = [name.split("/", 2)[2] for name in names_in(tmp_path / "m.zip") if "/ensembles/" in name]
    assert sorted(found) == [
        f"ensemble___{one}___nnUNetTrainer__nnUNetPlans__3d_fullres___0_1/{name}"
        for name in ("postprocessing.pkl", "summary.json")
    ]


def test_planned_configurations_must_be_trained_unless_not_strict(models, tmp_path, monkeypatch):
    import shutil

    shutil.rmtree(models / "nnUNetTrainer__nnUNetPlans__3d_fullres")
    arguments = ["nnUNetv2_export_model_to_zip", "-d", NAME, "-o", str(tmp_path / "m.zip"), "-f", "0", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        entry_points.export_pretrained_model_entry()
    assert not (tmp_path / "m.zip").exists()
    monkeypatch.setattr(sys, "argv", [*arguments, "--not_strict"])
    entry_points.export_pretrained_model_entry()
    assert f"{MODEL}/plans.json" in names_in(tmp_path / "m.zip")


@pytest.mark.parametrize(
    ("missing", "error"),
    [("fold_1/checkpoint_final.pth", FileNotFoundError), ("dataset_fingerprint.json", FileNotFoundError)],
)
def test_what_prediction_needs_must_be_there(models, tmp_path, missing, error):
    (models.parent / MODEL / missing).unlink()
    with pytest.raises(error, match=missing.split("/")[-1]):
        export_pretrained_model(NAME, str(tmp_path / "m.zip"), ["2d"], folds=(0, 1))
    with pytest.raises(AssertionError, match="lacks the folds 7"):
        export_pretrained_model(NAME, str(tmp_path / "m.zip"), ["2d"], folds=(0, 7))
    assert not (tmp_path / "m.zip").exists()


def test_pictures_and_scores_are_optional(models, tmp_path):
    for name in ("progress.png", "validation/summary.json"):
        (models.parent / MODEL / "fold_0" / name).unlink()
    export_pretrained_model(NAME, str(tmp_path / "m.zip"), ["2d"], folds=(0,))
    assert f"{MODEL}/fold_0/checkpoint_final.pth" in names_in(tmp_path / "m.zip")


def test_an_export_is_installed_elsewhere_and_over_what_is_there(exported, tmp_path, monkeypatch):
    target = tmp_path / "elsewhere"
    monkeypatch.setenv("nnUNet_results", str(target))
    for _ in range(2):
        install_model_from_zip_file(str(exported))
    assert sorted(everything_below(target)) == sorted(names_in(exported))


def test_what_a_killed_installation_has_left_is_removed_a_day_later(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "elsewhere"))
    for name, age_s in (("old", 2 * 86400), ("young", 3600)):
        (tmp_path / "elsewhere" / f".partial-{name}").mkdir(parents=True)
        os.utime(tmp_path / "elsewhere" / f".partial-{name}", (time.time() - age_s,) * 2)
    install_model_from_zip_file(str(exported))
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == [".partial-young", NAME]


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


MALICIOUS = {
    "parent": [(f"{NAME}/../../evil.json", "{}")],
    "parent with backslash": [(f"{NAME}\\..\\..\\evil.json", "{}")],
    "absolute": [("/tmp/evil_of_a_zip.json", "{}")],
    "drive": [("C:/evil.json", "{}")],
    "link": [(link(f"{MODEL}/fold_0"), "/tmp")],
    "link to a file": [(link(f"{MODEL}/plans.json"), "/etc/passwd")],
    "module": [(f"{MODEL}/trainer.py", "open('evil', 'w')")],
    "program": [(f"{MODEL}/fold_0/run.sh", "touch evil")],
    "no dataset": [("plans.json", "{}")],
    "unseen": [(f"{MODEL}/plans\x1b[2K.json", "{}")],
    "turned": [(f"{MODEL}/\u202enosj.json", "{}")],
    "hidden": [(".bashrc", "touch evil")],
    "twice": [(f"{MODEL}/plans.json", "{}"), (f"{MODEL}/PLANS.json", "{}")],
    "bomb": [(f"{MODEL}/plans.json", b"0" * (40 * 2**20))],
}


@pytest.mark.parametrize("kind", MALICIOUS)
def test_archives_that_mean_harm_are_refused_whole(roots, tmp_path, kind):
    before = everything_below(tmp_path)
    path = write_zip(tmp_path / "evil.zip", [(f"{MODEL}/dataset.json", "{}"), *MALICIOUS[kind]])
    with pytest.raises(UnsafeArchiveError, match=r"evil\.zip"):
        install_model_from_zip_file(str(path))
    path.unlink()
    assert everything_below(tmp_path) == before
    assert not Path("/tmp/evil_of_a_zip.json").exists()


def test_a_link_among_the_models_does_not_lead_files_elsewhere(roots, tmp_path):
    (tmp_path / "private").mkdir()
    (roots["nnUNet_results"] / NAME).symlink_to(tmp_path / "private")
    with pytest.raises(UnsafeArchiveError, match="through the link"):
        install_model_from_zip_file(str(write_zip(tmp_path / "m.zip", [(f"{NAME}/dataset.json", "{}")])))
    assert not list((tmp_path / "private").iterdir())


def test_an_archive_has_a_largest_size(roots, tmp_path, monkeypatch):
    path = write_zip(tmp_path / "m.zip", [(f"{MODEL}/fold_0/checkpoint_final.pth", bytes(range(256)) * 8000)])
    monkeypatch.setenv("nnUNet_max_model_gb", "0.001")
    with pytest.raises(UnsafeArchiveError, match="nnUNet_max_model_gb"):
        install_model_from_zip_file(str(path))
    monkeypatch.setenv("nnUNet_max_model_gb", "much")
    with pytest.raises(ValueError, match="must be a number"):
        install_model_from_zip_file(str(path))
    with pytest.raises(ValueError, match="at least 1"):
        ArchiveLimits(members=0)


def test_a_member_larger_than_the_directory_says_is_refused(roots, tmp_path):
    path = write_zip(tmp_path / "m.zip", [(f"{MODEL}/plans.json", b"0" * 5000)])
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\x01\x02") + 24  # uncompressed size in the central directory
    content[place : place + 4] = (10).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises((UnsafeArchiveError, ValueError)):
        install_model_from_zip_file(str(path))
    assert not list(roots["nnUNet_results"].iterdir())


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04"])
def test_what_is_no_zip_file_is_named(roots, tmp_path, content):
    (tmp_path / "m.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.zip is no zip file"):
        install_model_from_zip_file(str(tmp_path / "m.zip"))


def test_a_truncated_archive_changes_nothing(exported, roots, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "elsewhere"))
    content = bytearray(exported.read_bytes())
    content[40:60] = b"x" * 20
    exported.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        install_model_from_zip_file(str(exported))
    assert not list((tmp_path / "elsewhere").iterdir())


class _Server:
    """Serves one body on loopback; `announce` is what Content-Length says."""

    def __init__(self, body, announce=None, location=None):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if location and self.path == "/m.zip":
                    self.send_response(302)
                    self.send_header("Location", location)
                    self.end_headers()
                    return
                self.send_response(200)
                if announce is not None:
                    self.send_header("Content-Length", str(announce))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/m.zip"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("with_length", [True, False])
def test_a_model_is_downloaded_and_installed(exported, tmp_path, monkeypatch, with_length):
    body = exported.read_bytes()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody is there, and nobody has to be: it is this machine
    with _Server(body, len(body) if with_length else None) as server:
        download_and_install_from_url(server.url, hashlib.sha256(body).hexdigest())
    assert sorted(everything_below(tmp_path / "elsewhere")) == sorted(names_in(exported))


@pytest.mark.slow
def test_another_checksum_or_too_large_a_file_installs_nothing(exported, tmp_path, monkeypatch):
    body = exported.read_bytes()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "elsewhere"))
    with _Server(body, len(body)) as server, pytest.raises(ValueError, match="not the expected file"):
        download_and_install_from_url(server.url, "0" * 64)
    with _Server(body, None) as server, pytest.raises(ValueError, match="larger than the limit"):
        download_file(server.url, str(tmp_path / "m.zip"), max_bytes=100)
    with _Server(body, len(body) + 10) as server, pytest.raises(OSError):  # noqa: PT011  as the platform puts it
        download_file(server.url, str(tmp_path / "m.zip"))
    assert not (tmp_path / "m.zip").exists()
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("url", ["http://example.org/m.zip", "ftp://example.org/m.zip", "file:///etc/passwd", "m.zip"])
def test_models_come_over_https_only(roots, url):
    with pytest.raises(ValueError, match="https only"):
        download_and_install_from_url(url)


def test_redirections_stay_on_https(tmp_path):
    with (
        _Server(b"", location="http://127.0.0.1.example.invalid/m.zip") as server,
        pytest.raises((ValueError, OSError)),
    ):
        download_file(server.url, str(tmp_path / "m.zip"))
    assert not (tmp_path / "m.zip").exists()


def test_a_checksum_must_be_one(tmp_path):
    with pytest.raises(ValueError, match="is no SHA-256"):
        download_file("https://example.org/m.zip", str(tmp_path / "m.zip"), sha256="abc")


def test_commands_install_and_say_what_is_wrong(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_install_pretrained_model_from_zip", str(exported)])
    entry_points.install_from_zip_entry_point()
    assert json.loads((tmp_path / "elsewhere" / MODEL / "dataset.json").read_text())["numTraining"] == 6
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_download_pretrained_model_by_url", "http://example.org/m.zip"])
    with pytest.raises(SystemExit):
        entry_points.download_by_url()
    assert "https only" in capsys.readouterr().err
    entry_points.print_license_warning()
    assert "terms" in capsys.readouterr().out


def test_of_a_private_model_only_what_its_privacy_covers_is_exported(models, tmp_path):
    for fold in (0, 1):
        (models.parent / MODEL / f"fold_{fold}" / "privacy.json").write_text("{}")
    export_pretrained_model(NAME, str(tmp_path / "m.zip"), ["2d"], folds=(0, 1))
    left = {name.removeprefix(f"{MODEL}/") for name in names_in(tmp_path / "m.zip")}
    files = {f"fold_{fold}/{name}" for fold in (0, 1) for name in ("privacy.json", "checkpoint_final.pth")}
    assert left == {"plans.json", "dataset.json", *files}
