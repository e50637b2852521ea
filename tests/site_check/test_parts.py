"""What the command is made of: findings, forecast, memory, and lines that end in other ways."""

from __future__ import annotations

import io
import json
import subprocess

import pytest
from doors import SlowLine, forward, server
from fake_federation import make_settings, served
from tiny_dataset import make_configuration, make_dataset_json, make_plans

from nnunetv2.experiment_planning.experiment_planners.vram_proxy import PLAIN_UNET
from nnunetv2.federated.site.credential import SiteCredential
from nnunetv2.site_check import line, trial_steps
from nnunetv2.site_check.findings import Finding, describe, summarise, to_json
from nnunetv2.site_check.forecast import Forecast, check_speed, training_seconds
from nnunetv2.site_check.memory import Trial, check_trial, estimate_gb


def make_finding(state="ok", **changes) -> Finding:
    return Finding(**{"area": "line", "name": "connection", "state": state, "sentence": "It works.", **changes})


# -------------------------------------------------------------------------------------------------------- findings
def test_findings_are_told_by_area_with_their_remedies():
    findings = [make_finding(), make_finding("problem", area="data", sentence="It is cut\x1b[2J.", remedy="Copy it.")]
    lines = list(describe(findings, ["10 GB in all"], seconds=61.4))
    assert "\n".join(lines) == (
        "\nLine\n  ok       It works.\n\nData\n  PROBLEM  It is cut\\x1b[2J.\n           -> Copy it.\n"
        "\nForecast\n  10 GB in all\n\n1 problem; 1 in order (61 s)"
    )


@pytest.mark.parametrize(
    ("states", "text"),
    [
        (["ok", "ok", "note"], "2 in order"),
        (["warning", "warning"], "2 warnings; 0 in order"),
        (["problem", "warning", "ok"], "1 problem and 1 warning; 1 in order"),
    ],
)
def test_all_findings_in_one_line(states, text):
    assert summarise([make_finding(state) for state in states]) == text


def test_programs_read_all_of_it():
    content = to_json([make_finding(), make_finding("warning")], {"rounds": 3}, seconds=1.26)
    assert (content["in_order"], content["seconds"], content["forecast"]) == (True, 1.3, {"rounds": 3})
    assert json.loads(json.dumps(content)) == content
    assert not to_json([make_finding("problem")], {}, seconds=1)["in_order"]


# -------------------------------------------------------------------------------------------------------- forecast
def test_hours_and_gigabytes_of_a_run():
    forecast = Forecast(rounds=999, update_bytes=10**8, transfer_s=36.0, training_s=3600.0)
    assert forecast.gigabytes == pytest.approx(200)
    assert forecast.hours == pytest.approx(999 * 1.01)
    assert Forecast(rounds=1, update_bytes=1).hours is None
    assert "transfers: not measured" in "\n".join(Forecast(rounds=1, update_bytes=1).lines())
    assert training_seconds(0.5, num_steps=250, num_validation_steps=50) == pytest.approx(135)


@pytest.mark.parametrize(("seconds", "is_slow"), [(None, False), (119, False), (121, True)])
def test_a_line_is_slow_if_transfers_last_as_long_as_training(seconds, is_slow):
    assert bool(list(check_speed(Forecast(rounds=10, update_bytes=1, transfer_s=seconds)))) == is_slow


# ---------------------------------------------------------------------------------------------------------- memory
def test_the_estimate_is_that_of_the_planner():
    """This patch, with a batch of 2, is what it chooses for 8 GB."""
    configuration = {
        **make_configuration(batch_size=2),
        "patch_size": [128, 128, 128],
        "architecture": {
            "network_class_name": PLAIN_UNET,
            "_kw_requires_import": [],
            "arch_kwargs": {
                "n_stages": 6,
                "features_per_stage": [32, 64, 128, 256, 320, 320],
                "strides": [[1] * 3, *[[2] * 3] * 5],
                "n_conv_per_stage": [2] * 6,
                "n_conv_per_stage_decoder": [2] * 5,
            },
        },
    }
    assert 6 < estimate_gb(configuration, num_inputs=1, num_outputs=3) < 8


@pytest.mark.parametrize(
    ("trial", "state", "name"),
    [
        (Trial(device="cpu", step_s=20.0), "warning", "no_gpu"),
        (Trial(device="cpu"), "warning", "no_gpu"),
        (Trial(device="RTX", step_s=0.2, peak_gb=8.1, total_gb=12.0), "ok", "gpu"),
        (Trial(device="RTX", total_gb=4.0, peak_gb=4.0, failure="its memory is too small"), "problem", "gpu_memory"),
        (Trial(device="RTX", total_gb=4.0, peak_gb=4.0), "problem", "gpu_memory"),
    ],
)
def test_a_trial_is_judged(trial, state, name):
    found = check_trial("3d_fullres", 7.6, trial)
    assert (found.state, found.name) == (state, name)
    assert bool(found.remedy) == (state != "ok")


def test_steps_are_measured_in_this_process_too(monkeypatch, capsys):
    task = {
        "plans": make_plans(),
        "dataset_json": make_dataset_json(),
        "configuration": "3d_fullres",
        "device": "cpu",
        "limit_s": 0.0,
    }
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(task)))
    trial_steps.main()
    trial = Trial(**json.loads(capsys.readouterr().out))
    assert trial.step_s > 0 and trial.peak_gb is None


# ------------------------------------------------------------------------------------------------------------ line
def names_of(findings) -> list[str]:
    return [finding.name for finding in findings]


@pytest.mark.slow
def test_a_certificate_for_another_name(tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "9", "-subj", "/CN=other.example"]
    command += ["-addext", "subjectAltName=DNS:other.example", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    with server(lambda _: (404, {}, b""), (certificate, key)) as url:
        credential = SiteCredential(url, "f", "A", "A.secret-of-the-site", authority=str(certificate))
        assert names_of(line.check_line(credential, 1000).findings) == ["connection", "certificate_name"]


def test_plain_http_where_tls_is_expected():
    with server(lambda _: (404, {}, b"")) as url:
        credential = SiteCredential(url.replace("http:", "https:"), "f", "A", "A.secret-of-the-site")
        assert names_of(line.check_line(credential, 1000).findings) == ["connection", "no_tls"]


def test_plain_http_to_another_machine_is_refused():
    credential = SiteCredential("http://coordinator.example:8750", "f", "A", "A.secret-of-the-site")
    (found,) = line.check_line(credential, 1000).findings
    assert found.state == "problem" and found.remedy


def test_an_allow_list_for_another_coordinator_lets_no_dummy_round_out(tmp_path):
    with served(tmp_path / "federation", make_settings()) as federation:
        checked = line.check_line(federation.credential("A"), 1000, may_send=False)
        assert names_of(checked.findings)[-1] == "dummy_round_refused" and checked.up is None
        assert not any(row[2] == "rehearsal" for row in federation.state.store.load_log())


def test_a_line_that_carries_next_to_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(line, "PASSAGE_S", 0.0)
    with served(tmp_path / "federation", make_settings()) as federation, SlowLine(federation.url, 40_000) as relay:
        credential = federation.credential("A")
        slow = SiteCredential(relay.url, credential.federation, credential.site, credential.token)
        checked = line.check_line(slow, 10**8)
    assert names_of(checked.findings)[-1] == "dummy_round_too_slow"


@pytest.mark.slow
def test_a_download_that_breaks_off(tmp_path):
    with served(tmp_path / "federation", make_settings()) as federation:

        def cut(request):
            status, headers, content = forward(federation.url, request)
            if request.path.startswith("/v1/rehearsal?") and len(content) > 100_000:
                return status, {**headers, "Content-Length": str(len(content))}, content[:100_000]
            return status, headers, content

        with server(cut) as url:
            credential = federation.credential("A")
            there = SiteCredential(url, credential.federation, credential.site, credential.token)
            checked = line.check_line(there, 1_000_000)
    assert names_of(checked.findings)[-1] == "large_answers_cut"
