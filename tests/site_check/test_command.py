"""A hospital's first day: everything in order, and faults that are planted one by one, over real HTTP."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
from doors import SlowLine, bounding, of_an_older_version, of_another_version, server, with_clock
from fake_federation import make_settings, served
from patience import PATIENCE_S
from planning_scans import write_nifti
from privileges import privileges_dropped
from tiny_dataset import make_dataset_json, make_plans

from nnunetv2.federated.coordinator.http import tls
from nnunetv2.federated.site.credential import SiteCredential, save_credential
from nnunetv2.site_check import checks, command, line, memory
from nnunetv2.site_check.memory import Trial, try_steps

NAME = "Dataset123_Hospital"
SHAPE = (12, 14, 16)
SITE = "B"


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    with served(tmp_path_factory.mktemp("first_day") / "federation", make_settings()) as one:
        yield one


@pytest.fixture
def dataset(roots, monkeypatch) -> Path:
    """Write twelve cases, plans and no preprocessed data."""
    raw, preprocessed = roots["nnUNet_raw"] / NAME, roots["nnUNet_preprocessed"] / NAME
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    preprocessed.mkdir()
    rng = np.random.default_rng(0)
    label = np.zeros(SHAPE, np.uint8)
    label[2:6, 2:8, 2:8], label[3, 3, 3] = 1, 2
    for number in range(12):
        write_nifti(rng.normal(size=SHAPE).astype(np.float32), raw / "imagesTr" / f"case_{number:02}_0000.nii.gz")
        write_nifti(label, raw / "labelsTr" / f"case_{number:02}.nii.gz")
    (raw / "dataset.json").write_text(json.dumps(make_dataset_json(numTraining=12)))
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(make_plans()))
    monkeypatch.setenv("nnUNet_fed_min_cases", "10")
    monkeypatch.setattr("nnunetv2.site_check.checks.DATA_S", PATIENCE_S)
    monkeypatch.setattr("nnunetv2.site_check.checks.try_steps", lambda *_, **__: Trial(device="cpu", step_s=0.25))
    return raw


@pytest.fixture
def join(federation, tmp_path, monkeypatch):
    """Let this machine be a member of a federation, at whatever address."""

    def join(url: str | None = None, **changes) -> None:
        credential = federation.credential(SITE)
        changed = SiteCredential(
            **{**{name: getattr(credential, name) for name in ("federation", "site", "token")}, **changes},
            url=url or credential.url,
        )
        monkeypatch.setenv("nnUNet_fed_site", str(save_credential(changed, tmp_path / "credential.json")))
        monkeypatch.setenv("HOME", str(tmp_path))

    join()
    return join


@pytest.fixture
def check(join, dataset, capsys):
    """Run the command and return exit status and findings, name -> finding, of those that are not in order."""

    def check(*options: str, dataset: str | None = NAME) -> tuple[int, dict[str, dict]]:
        status = command.main([*([dataset] if dataset else []), *options, "--json"])
        report = json.loads(capsys.readouterr().out)
        assert all(one["remedy"] for one in report["findings"] if one["state"] == "problem")
        return status, {one["name"]: one for one in report["findings"] if one["state"] in ("warning", "problem")}

    return check


@pytest.fixture
def fails(check):
    """Check that one problem is found, and return it."""

    def fails(name: str, *options: str, **more) -> dict[str, str]:
        status, findings = check(*options, **more)
        problems = [one for one, finding in findings.items() if finding["state"] == "problem"]
        assert (status, problems) == (1, [name])
        return findings[name]

    return fails


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


# --------------------------------------------------------------------------------------------------- all in order
@pytest.mark.slow
def test_what_is_in_order_is_said_and_what_it_will_cost(check, capsys):
    assert check()[0] == 0
    command.main([NAME])
    lines = capsys.readouterr().out.splitlines()
    for begin in ("  ok       A connection to the coordinator", "  ok       The coordinator of test knows site B"):
        assert any(one.startswith(begin) for one in lines)
    assert any("A dummy round of 65.5 KB each way" in one for one in lines)
    assert any("12 of 12 cases read, no fault found" in one for one in lines)
    assert any("3 rounds with " in one for one in lines)
    assert any("training: 1 min 8 s per round" in one for one in lines)
    assert "1 warning; " in lines[-1]  # there is no GPU


def test_the_times_of_all_parts_are_two_minutes_at_most():
    of_line = line.CONNECT_TIMEOUT_S + 4 * line.PASSAGE_S + line.PROBE_S
    assert of_line + checks.DATA_S + checks.TRIAL_S + memory.START_S <= 120


@pytest.mark.slow
def test_without_a_dataset_the_line_alone_is_checked(check):
    assert check(dataset=None) == (0, {})


@pytest.mark.slow
def test_steps_are_tried_on_this_machine(check, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(memory, "START_S", PATIENCE_S)
    trial = try_steps(make_plans(), make_dataset_json(), "3d_fullres", device="cpu", limit_s=1)
    assert trial.step_s > 0 and not trial.failure
    broken = make_plans()
    broken["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "no.such.Network"
    assert "no.such.Network" in try_steps(broken, make_dataset_json(), "3d_fullres", device="cpu", limit_s=1).failure


# ------------------------------------------------------------------------------------------------ planted: the line
def test_1_a_coordinator_that_is_down(fails, join):
    join(f"http://127.0.0.1:{free_port()}")
    assert "Nothing listens at 127.0.0.1" in fails("coordinator_down")["sentence"]


def test_2_a_wrong_port_where_something_else_answers(fails, join):
    with server(lambda request: (200, {"Content-Type": "text/html"}, b"<html>printer</html>")) as url:
        join(url)
        assert "not as a coordinator would" in fails("not_the_coordinator")["sentence"]


def test_3_a_name_that_is_unknown(fails, join):
    join("https://coordinator.invalid:8750")
    assert "name servers" in fails("name_unknown")["remedy"]


@pytest.mark.slow
def test_4_a_certificate_of_an_inspecting_proxy(fails, join, tmp_path):
    genuine = tls.private_certificate(tmp_path / "genuine", ["127.0.0.1"])
    foreign = tls.private_certificate(tmp_path / "foreign", ["127.0.0.1"])

    def inspect(request):  # it passes on what the coordinator says of its authority
        return 200, {"Content-Type": "application/x-pem-file"}, genuine.authority.read_bytes()

    with server(inspect, (foreign.certificate, foreign.key)) as url:
        join(url, authority=str(genuine.authority))
        assert "inspection of TLS" in fails("certificate_foreign")["remedy"]


def test_5_a_certificate_that_has_expired(fails, join, tmp_path, monkeypatch):
    monkeypatch.setattr(tls, "BACKDATED_S", 86_400)
    monkeypatch.setattr(tls, "CERTIFICATE_DAYS", -0.5)
    made = tls.private_certificate(tmp_path / "expired", ["127.0.0.1"])
    with server(answer_with_date, (made.certificate, made.key)) as url:
        join(url, authority=str(made.authority))
        assert "has expired" in fails("certificate_expired")["sentence"]


@pytest.mark.slow
def test_6_a_wrong_authority_in_the_credential(fails, join, tmp_path):
    genuine = tls.private_certificate(tmp_path / "genuine", ["127.0.0.1"])
    other = tls.private_certificate(tmp_path / "other", ["127.0.0.1"])

    def answer(request):
        return 200, {"Content-Type": "application/x-pem-file"}, genuine.authority.read_bytes()

    with server(answer, (genuine.certificate, genuine.key)) as url:
        join(url, authority=str(other.authority))
        assert "by telephone" in fails("authority_changed")["remedy"]


def test_7_a_credential_that_was_revoked(fails, join):
    join(token=f"{SITE}.revoked-and-forgotten")
    assert "--replace" in fails("credential_refused")["remedy"]


@pytest.mark.slow
@pytest.mark.parametrize(("off_s", "words"), [(600, "behind"), (-600, "ahead of")])
def test_8_a_clock_that_is_off(fails, join, federation, off_s, words):
    with server(with_clock(federation.url, off_s=off_s)) as url:
        join(url)
        found = fails("clock_off")["sentence"]
    assert f" {words} the coordinator's" in found and "min " in found


def test_9_a_proxy_that_refuses(fails, join, monkeypatch):
    with server(lambda request: (403, {"Content-Type": "text/html"}, b"no")) as url:
        monkeypatch.setenv("HTTPS_PROXY", url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        join("https://coordinator.example:8750")
        assert "403" in fails("proxy_refuses")["sentence"]


def test_10_a_proxy_that_is_down(fails, join, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    join("https://coordinator.example:8750")
    assert "HTTPS_PROXY" in fails("proxy_down")["remedy"]


def test_11_a_proxy_that_cuts_large_bodies(fails, join, federation):
    with server(bounding(federation.url, 1 << 20)) as url:
        join(url)
        assert "client_max_body_size" in fails("large_bodies_cut", dataset=None)["remedy"]


def test_12_a_version_that_says_more(fails, join, federation):
    with server(of_another_version(federation.url)) as url:
        join(url)
        assert "invented_later" in fails("version")["sentence"]


def test_13_a_coordinator_that_is_too_old_to_rehearse(check, join, federation):
    with server(of_an_older_version(federation.url)) as url:
        join(url)
        status, findings = check(dataset=None)
        assert (status, list(findings)) == (0, ["version_older"])


@pytest.mark.slow
def test_14_a_slow_line(check, join, federation, monkeypatch):
    monkeypatch.setattr(line, "PASSAGE_S", 1.0)
    with SlowLine(federation.url, 500_000) as relay:
        join(relay.url)
        status, findings = check(dataset=None)
    assert (status, list(findings)) == (0, ["slow_line"])
    assert "--precision float16" in findings["slow_line"]["remedy"]


def test_15_a_site_that_has_not_joined(fails, join, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_fed_site", str(tmp_path / "nothing.json"))
    assert "nnUNetv2_fed_join" in fails("not_joined")["remedy"]


# ---------------------------------------------------------------------------------------------- planted: the machine
def test_16_a_disk_that_is_nearly_full(fails, tmp_path, roots, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100 << 20))
    assert "0.1 GB free" in fails("disk_full")["sentence"]


def test_16_a_real_disk_that_is_nearly_full(check, roots):
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(roots["nnUNet_results"])]
    if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a disk takes root's rights")
    try:
        status, findings = check()
    finally:
        subprocess.run(["umount", str(roots["nnUNet_results"])], check=True)
    assert status == 1 and "nnUNet_results" in findings["disk_full"]["sentence"]


def test_17_a_folder_that_is_read_only(fails, roots):
    roots["nnUNet_results"].chmod(0o555)
    with privileges_dropped():
        found = fails("folder_read_only")
    assert "nnUNet_results" in found["sentence"] and "ermission denied" in found["sentence"]


def test_18_a_variable_that_is_not_set(check, monkeypatch):
    monkeypatch.delenv("nnUNet_results")
    status, findings = check()
    assert status == 1 and "export nnUNet_results=" in findings["variable_missing"]["remedy"]


# ------------------------------------------------------------------------------------------------- planted: the data
def test_19_an_image_that_cannot_be_read(fails, dataset):
    image = dataset / "imagesTr" / "case_03_0000.nii.gz"
    image.write_bytes(image.read_bytes()[:-3000])
    found = fails("image_unreadable")
    assert "case_03_0000.nii.gz" in found["sentence"] and "--without_bad_cases" in found["remedy"]


def test_20_a_geometry_that_does_not_match(fails, dataset):
    write_nifti(np.ones((9, 14, 16), np.uint8), dataset / "labelsTr" / "case_04.nii.gz")
    assert "9 x 14 x 16 instead of 12 x 14 x 16" in fails("geometry_differs")["sentence"]


def test_21_a_label_that_is_missing(fails, dataset):
    (dataset / "labelsTr" / "case_05.nii.gz").unlink()
    assert "labelsTr/case_05.nii.gz" in fails("file_missing")["sentence"]


def test_22_an_image_that_occurs_twice(check, dataset):
    shutil.copy(dataset / "imagesTr" / "case_01_0000.nii.gz", dataset / "imagesTr" / "case_07_0000.nii.gz")
    status, findings = check()
    assert status == 0 and "case_07_0000.nii.gz (as imagesTr/case_01" in findings["duplicate_image"]["sentence"]


def test_23_siblings_on_both_sides_of_a_split(check, dataset, roots):
    for folder in ("imagesTr", "labelsTr"):
        for file in list((dataset / folder).iterdir()):
            number = int(file.name[5:7])
            file.rename(file.with_name(file.name.replace(f"case_{number:02}", f"P{number // 2}_t{number % 2}")))
    cases = [f"P{number // 2}_t{number % 2}" for number in range(12)]
    splits = [{"train": cases[:7], "val": cases[7:]}]
    (roots["nnUNet_preprocessed"] / NAME / "splits_final.json").write_text(json.dumps(splits))
    status, findings = check()
    assert status == 0 and "P3_t0, P3_t1" in findings["siblings_separated"]["sentence"]
    assert "nnUNetv2_make_splits" in findings["siblings_separated"]["remedy"]


def test_24_too_few_cases(fails, monkeypatch):
    monkeypatch.setenv("nnUNet_fed_min_cases", "30")
    assert "30 or more" in fails("too_few_cases")["sentence"]


def test_bad_cases_that_are_left_out_are_no_problem(check, dataset, roots):
    (dataset / "labelsTr" / "case_05.nii.gz").unlink()
    entry = {"case": "case_05", "file": "labelsTr/case_05.nii.gz", "reason": "file is missing"}
    (roots["nnUNet_preprocessed"] / NAME / "bad_cases.json").write_text(json.dumps([entry]))
    assert check()[0] == 0


# -------------------------------------------------------------------------------- planted: permission and training
def test_25_an_allow_list_that_forbids_a_step(fails, tmp_path, monkeypatch, capsys):
    from nnunetv2.federated.commands.manifest import main as manifest

    allowed = tmp_path / "allow.json"
    manifest([NAME, "--write-allow-list", str(allowed)])
    monkeypatch.setenv("nnUNet_fed_allow", str(allowed))
    content = json.loads(allowed.read_text())
    content["documents"]["update"]["tensors"].remove("decoder.*")
    allowed.write_text(json.dumps(content))
    capsys.readouterr()
    assert "decoder." in fails("allow_list_forbids")["sentence"]


def test_an_allow_list_that_cannot_be_read_lets_nothing_out(check, tmp_path, monkeypatch, federation):
    (tmp_path / "allow.json").write_text("{")
    monkeypatch.setenv("nnUNet_fed_allow", str(tmp_path / "allow.json"))
    before = len(federation.state.store.load_log())
    assert check()[1]["allow_list_unreadable"]["remedy"]
    assert len(federation.state.store.load_log()) == before  # no dummy round either


def test_a_minimum_of_cases_that_is_no_number(check, monkeypatch):
    monkeypatch.setenv("nnUNet_fed_min_cases", "ten")
    assert "min_cases" in check()[1]


def test_a_credential_that_is_no_credential(fails, monkeypatch, tmp_path):
    (tmp_path / "odd.json").write_text("[]")
    monkeypatch.setenv("nnUNet_fed_site", str(tmp_path / "odd.json"))
    assert fails("not_joined")["remedy"]


def test_an_allow_list_of_these_documents_lets_them_out(check, tmp_path, monkeypatch, capsys):
    from nnunetv2.federated.commands.manifest import main as manifest

    manifest([NAME, "--write-allow-list", str(tmp_path / "allow.json")])
    monkeypatch.setenv("nnUNet_fed_allow", str(tmp_path / "allow.json"))
    capsys.readouterr()
    assert check()[0] == 0


def test_26_plans_that_are_too_large_for_the_gpu(fails, roots):
    plans = make_plans(batch_size=64)
    (roots["nnUNet_preprocessed"] / NAME / "nnUNetPlans.json").write_text(json.dumps(plans))
    assert "-gpu_memory_target" in fails("gpu_memory", "--gpu_memory", "0.01")["remedy"]


def test_a_gpu_given_that_is_large_enough(check):
    assert check("--gpu_memory", "24")[0] == 0


def test_cases_that_the_time_does_not_suffice_for_are_told(check, monkeypatch, capsys):
    monkeypatch.setattr("nnunetv2.site_check.checks.DATA_S", 0.0)
    command.main([NAME])
    printed = capsys.readouterr().out
    assert "of 12 cases read in the time of this check" in printed and "--all_cases" in printed
    assert check("--all_cases")[0] == 0


# --------------------------------------------------------------------------------------------------------- odd input
@pytest.mark.slow
def test_a_dataset_that_does_not_exist_and_one_without_plans(check, roots):
    assert "not_checked" in check(dataset="999")[1] or "dataset" in check(dataset="999")[1]
    assert "trains without a federation" in check("-tr", "nnUNetTrainer")[1]["not_checked"]["sentence"]
    assert "no configuration 5d" in check("5d")[1]["not_checked"]["sentence"]
    (roots["nnUNet_preprocessed"] / NAME / "nnUNetPlans.json").unlink()
    assert check()[0] == 0


@pytest.mark.parametrize("options", [["x"], [NAME, "--gpu_memory", "0"], [NAME, "--gpu_memory", "lots"]])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(SystemExit, match="2"):
        command.main(options)


def answer_with_date(request):
    return 404, {"Date": request.date_time_string()}, b""
