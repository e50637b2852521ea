"""Fetching the model of a run: who may, when, over which network, and what is installed."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile

import pytest
import requests
from cutter import Cutter, moved
from fake_federation import (
    RUN,
    SHAPES,
    in_threads,
    make_client,
    make_plans,
    make_registration,
    make_settings,
    served,
    train,
    wait_until,
)
from patience import PATIENCE_S

from nnunetv2.federated.commands import fetch_model
from nnunetv2.federated.commands.audit_log import describe
from nnunetv2.federated.coordinator.models import model_store
from nnunetv2.federated.errors import FederationError, NotJoinedError, RefusedError, WireError
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.api import RunState
from nnunetv2.federated.protocol.invitation import Invitation
from nnunetv2.federated.protocol.keys import RegistrationKey, ValidationKey
from nnunetv2.federated.site.credential import load_credential
from nnunetv2.federated.site.enrolment import join

BIG = {"encoder.weight": (512, 1024), "encoder.bias": (512,), "head.weight": (64, 512)}
MODEL = "Dataset001_Fake/nnUNetTrainerFake__nnUNetPlans__3d_fullres"


def finish(federation, *, shapes=SHAPES, num_rounds=1) -> None:
    """Let sites A and B train a run to its end, and wait for the model of its best round."""
    with federation.client("A") as a, federation.client("B") as b:
        in_threads(
            lambda: train(a, seed=1, num_rounds=num_rounds, shapes=shapes),
            lambda: train(b, seed=2, num_rounds=num_rounds, shapes=shapes),
        )
        for client in (a, b):
            client.contribute(ValidationKey(RUN, num_rounds - 1), messages.Validation(tp=(8,), fp=(2,), fn=(2,)))
    kept = federation.state.store.load_events
    wait_until(lambda: any(event.detail["rounds"]["best"] is not None for event in kept("model")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A federation whose only run is over; its weights have two MiB."""
    with served(tmp_path_factory.mktemp("finished") / "federation", make_settings(num_epochs=1)) as federation:
        finish(federation, shapes=BIG)
        yield federation


def admit(federation, name: str, role: str):
    """Invite somebody and return the credential."""
    secret = federation.coordinator.invite(name, role, by="test")
    path = federation.state.store.folder / f"credential.{name}.json"
    join(Invitation(federation.url, federation.coordinator.settings.federation, name, secret), path=path)
    return load_credential(path)


def use_credential(monkeypatch, tmp_path, federation, site: str) -> None:
    """Let commands be those of a site, in an empty folder."""
    federation.credential(site)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("nnUNet_fed_site", str(federation.state.store.folder / f"credential.{site}.json"))


def ask(federation, token: str | None, run: str = RUN, **headers: str) -> requests.Response:
    authorization = {} if token is None else {"Authorization": f"Bearer {token}"}
    return requests.get(
        f"{federation.url}/v1/runs/{run}/model", headers={**authorization, **headers}, timeout=PATIENCE_S
    )


# ----------------------------------------------------------------------------------------------------------- over HTTP
def test_a_site_and_an_operator_get_the_file_that_the_coordinator_keeps(finished, tmp_path):
    kept = finished.state.store.folder / "models" / "nnUNetTrainerFake__nnUNetPlans__3d_fullres.zip"
    for credential in (finished.credential("B"), admit(finished, "olga", "operator")):
        with make_client(credential) as client:
            path = fetch_model.fetch(client, RUN, tmp_path / credential.site)
        assert path == tmp_path / credential.site / f"{RUN}.zip"
        assert path.read_bytes() == kept.read_bytes()
    assert [str(name) for name in fetch_model.checkpoints_in(path)] == [
        f"{MODEL}/fold_0/checkpoint_best.pth",
        f"{MODEL}/fold_0/checkpoint_final.pth",
    ]


def test_asking_whether_there_is_a_model_fetches_none(finished, monkeypatch):
    def no_digest(*_: object) -> str:
        raise AssertionError("the whole file was read for HEAD")

    monkeypatch.setattr(model_store, "_digest", no_digest)
    url, before = f"{finished.url}/v1/runs/{RUN}/model", finished.state.store.load_events("fetch")
    authorization = {"Authorization": f"Bearer {finished.credential('B').token}"}
    answer = requests.head(url, headers=authorization, timeout=30)
    path = finished.coordinator.models.find(RUN)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["Content-Length"] == str(path.stat().st_size)
    assert answer.headers["Content-Type"] == "application/zip"
    assert requests.head(url, timeout=30).status_code == 401
    assert requests.head(url.replace(RUN, "other"), headers=authorization, timeout=30).status_code == 404
    assert finished.state.store.load_events("fetch") == before


def test_a_model_is_read_once_however_many_ask_at_the_same_time(finished, monkeypatch):
    read, file_digest = [], model_store.file_digest

    def read_slowly(path) -> str:
        read.append(path)
        time.sleep(0.2)
        return file_digest(path)

    monkeypatch.setattr(model_store, "file_digest", read_slowly)
    model_store._digest.cache_clear()
    models = in_threads(*(lambda: finished.coordinator.fetch_model(RUN, member="A") for _ in range(10)))
    assert len(read) == 1 and len(set(models)) == 1


def test_who_has_fetched_a_model_is_logged_once(finished, tmp_path):
    with finished.client("A") as client:
        for _ in range(2):
            fetch_model.fetch(client, RUN, tmp_path)
    events = [event for event in finished.state.store.load_events("fetch") if event.site == "A"]
    digest = hashlib.sha256((tmp_path / f"{RUN}.zip").read_bytes()).hexdigest()
    assert [(event.key, event.detail) for event in events] == [(RUN, {"digest": digest})]
    assert describe("fetch", RUN, events[0].detail) == f"the model of {RUN}"


def test_ranges_are_answered_and_named_by_the_digest(finished):
    token = finished.credential("A").token
    whole = ask(finished, token)
    digest = hashlib.sha256(whole.content).hexdigest()
    assert (whole.headers["X-Content-SHA256"], whole.headers["ETag"]) == (digest, f'"{digest}"')
    assert (whole.headers["Content-Type"], whole.headers["Cache-Control"]) == ("application/zip", "no-store")
    rest = ask(finished, token, Range="bytes=1000-", **{"If-Range": f'"{digest}"'})
    assert (rest.status_code, rest.content) == (206, whole.content[1000:])
    other = ask(finished, token, Range="bytes=1000-", **{"If-Range": f'"{"0" * 64}"'})
    assert (other.status_code, other.content) == (200, whole.content)


def test_a_download_goes_on_where_it_broke(finished, tmp_path):
    size = (finished.state.store.folder / "models" / "nnUNetTrainerFake__nnUNetPlans__3d_fullres.zip").stat().st_size
    with Cutter(finished.url, download=[900_000, 700_000]) as cutter:
        with make_client(moved(finished.credential("A"), cutter.url)) as client:
            path = fetch_model.fetch(client, RUN, tmp_path / "model.zip")
        assert size < cutter.carried["download"] < 900_000 + 700_000 + size  # those of three beginnings
    assert path.stat().st_size == size and zipfile.ZipFile(path).testzip() is None
    assert list(tmp_path.iterdir()) == [path]


def test_observers_strangers_and_revoked_sites_get_nothing(tmp_path):
    with served(tmp_path / "federation", make_settings(num_epochs=1)) as federation:
        finish(federation)
        refused = ask(federation, admit(federation, "otto", "observer").token)
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert refused.json()["message"] == "otto is an observer: this is for sites and operators"
        assert [ask(federation, token).status_code for token in (None, "A.wrong")] == [401, 401]
        b = federation.credential("B")
        federation.coordinator.revoke("B", by="test")
        with make_client(b) as client, pytest.raises(NotJoinedError):
            fetch_model.fetch(client, RUN, tmp_path)
        assert not list(tmp_path.glob("*.zip"))
        assert federation.state.store.load_events("fetch") == []


def test_there_is_no_model_before_the_run_is_over(tmp_path):
    with served(tmp_path / "federation", make_settings(num_epochs=3)) as federation:
        with federation.client("A") as a, federation.client("B") as b:
            in_threads(lambda: train(a, seed=1, num_rounds=2), lambda: train(b, seed=2, num_rounds=2))
            with pytest.raises(RefusedError, match="is not over: 2 of 3 rounds are closed") as refusal:
                fetch_model.fetch(a, RUN, tmp_path)
            assert refusal.value.code == "no_model"
            with pytest.raises(RefusedError, match="there is no run 'other'") as refusal:
                fetch_model.fetch(a, "other", tmp_path)
            assert refusal.value.code == "unknown_run"
            with pytest.raises(ValueError, match="cannot be part of a key"):
                fetch_model.fetch(a, "../../etc/passwd", tmp_path)
        answers = {name: ask(federation, federation.credential("A").token, name).status_code for name in (RUN, "other")}
        assert answers == {RUN: 404, "other": 404}


def test_where_plans_differ_there_is_no_model_and_the_difference_is_named(tmp_path):
    with served(tmp_path / "federation", make_settings(num_epochs=None)) as federation:

        def take_part(site, plans):
            with federation.client(site) as client:
                train(client, seed=1, num_rounds=1, plans=plans)

        in_threads(lambda: take_part("A", make_plans()), lambda: take_part("B", make_plans(transpose_forward=[2, 0])))
        with admit_operator(federation) as operator:
            operator.act(RUN, "stop")
        with federation.client("A") as client, pytest.raises(RefusedError, match="the plans differ") as refusal:
            fetch_model.fetch(client, RUN, tmp_path)
        assert refusal.value.code == "no_model" and str(tmp_path) not in str(refusal.value)


def admit_operator(federation):
    return make_client(admit(federation, "olga", "operator"))


def test_a_run_that_was_stopped_at_once_has_no_model(tmp_path):
    with (
        served(tmp_path / "federation", make_settings()) as federation,
        federation.client("A") as client,
        admit_operator(federation) as operator,
    ):
        client.contribute(RegistrationKey(RUN), make_registration())
        operator.act(RUN, "stop")
        with pytest.raises(RefusedError, match="before its first round was closed"):
            fetch_model.fetch(client, RUN, tmp_path)


def test_a_model_that_is_not_written_yet_is_asked_for_again(tmp_path, monkeypatch):
    keep = model_store.keep_models

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_store, "keep_models", no_space)
    monkeypatch.setattr("nnunetv2.federated.coordinator.aggregation_worker.RETRY_TIDYING_S", 0.05)
    with served(tmp_path / "federation", make_settings(num_epochs=1)) as federation:
        with federation.client("A") as a, federation.client("B") as b:
            in_threads(lambda: train(a, seed=1, num_rounds=1), lambda: train(b, seed=2, num_rounds=1))
        lines: list[str] = []

        def mend(line: str) -> None:
            lines.append(line)
            monkeypatch.setattr(model_store, "keep_models", keep)

        with make_client(federation.credential("A")) as client:
            client._report = mend
            fetch_model.fetch(client, RUN, tmp_path)
    assert any("is not written yet; trying again" in line for line in lines)


def test_a_model_that_somebody_removed_is_not_there(tmp_path):
    with served(tmp_path / "federation", make_settings(num_epochs=1)) as federation:
        finish(federation)
        (federation.state.store.folder / "models" / "nnUNetTrainerFake__nnUNetPlans__3d_fullres.zip").unlink()
        with federation.client("A") as client, pytest.raises(RefusedError, match="not in the coordinator's folder"):
            fetch_model.fetch(client, RUN, tmp_path)


# --------------------------------------------------------------------------------------------------------- the command
def test_the_command_takes_the_only_run_and_says_how_to_go_on(finished, tmp_path, monkeypatch, capsys):
    use_credential(monkeypatch, tmp_path, finished, "A")
    assert fetch_model.main([]) == 0
    text = capsys.readouterr().out
    assert f"The model of run {RUN} is in {RUN}.zip" in text
    assert f"  nnUNetv2_install_pretrained_model_from_zip {RUN}.zip\n" in text
    assert (
        "  nnUNetv2_predict -d Dataset001_Fake -c 3d_fullres -f 0 -tr nnUNetTrainerFake -p nnUNetPlans "
        "-chk checkpoint_best.pth -i IMAGES -o PREDICTIONS\n"
    ) in text


def test_installing_spares_what_this_site_has_trained(finished, tmp_path, monkeypatch, capsys, roots):
    use_credential(monkeypatch, tmp_path, finished, "A")
    own = roots["nnUNet_results"] / MODEL / "fold_0" / "checkpoint_final.pth"
    assert fetch_model.main([RUN, "-o", "models", "--install"]) == 0
    assert "It is installed" in capsys.readouterr().out and own.is_file()
    own.write_bytes(b"trained here")
    with pytest.raises(FederationError, match="most likely from this site's own training. --replace gives it up"):
        fetch_model.main([RUN, "-o", "models/again.zip", "--install"])
    assert own.read_bytes() == b"trained here" and (tmp_path / "models" / "again.zip").is_file()
    assert fetch_model.main([RUN, "-o", "models", "--install", "--replace"]) == 0
    assert own.read_bytes() != b"trained here"


def test_several_runs_are_listed(finished, tmp_path, monkeypatch, capsys):
    use_credential(monkeypatch, tmp_path, finished, "A")
    monkeypatch.setattr(fetch_model, "choose_run", lambda runs: None)
    assert fetch_model.main([]) == 0
    assert capsys.readouterr().out == f"Several runs are over; name one of them:\n  {RUN}\n"
    assert not list(tmp_path.glob("*.zip"))


def test_the_only_run_that_is_over_is_chosen():
    going_on, over, other = (
        RunState(run=name, closed=closed, rounds_closed=7) for name, closed in (("a", False), ("b", True), ("c", True))
    )
    assert fetch_model.choose_run([going_on, over]) == "b"
    assert fetch_model.choose_run([over, other]) is None
    with pytest.raises(FederationError, match=r"no run is over yet. Runs: a \(7 rounds closed\)"):
        fetch_model.choose_run([going_on])


def test_what_is_to_be_replaced_is_to_be_installed():
    with pytest.raises(SystemExit):
        fetch_model.main(["--replace"])


# ----------------------------------------------------------------------------------- where a model belongs at this site
def give_plans(root, dataset: str, **fields) -> None:
    """Let a dataset be planned at this site, as all sites of the run have planned theirs."""
    folder = root / dataset
    folder.mkdir(parents=True)
    (folder / "nnUNetPlans.json").write_text(json.dumps(make_plans(dataset_name=dataset, **fields)))


ODD_PLANS = {
    "a path": b'{"plans_name": "../../secret"}',
    "a pattern": b'{"plans_name": "../../**/*"}',
    "no name": b"{}",
    "a list": b"[]",
    "an abyss": b"[" * 5000,
    "no JSON": b"{",
    "none": None,
}


@pytest.mark.parametrize("plans", ODD_PLANS.values(), ids=ODD_PLANS)
def test_plans_from_a_coordinator_lead_to_no_other_files(tmp_path, roots, plans):
    give_plans(roots["nnUNet_preprocessed"], "Dataset007_Own", plans_name="nnUNetPlans")
    (tmp_path / "secret.json").write_text("not to be read")
    path, model = tmp_path / "model.zip", "Dataset001_x/nnUNetTrainer__*[__3d_fullres"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{model}/fold_0/checkpoint_final.pth", b"weights")
        if plans is not None:
            archive.writestr(f"{model}/plans.json", plans)
    with pytest.raises(WireError, match=r"no model|not proper JSON"):
        fetch_model.local_dataset(path)


def test_names_in_a_zip_file_are_no_patterns(tmp_path, roots):
    give_plans(roots["nnUNet_preprocessed"], "Dataset007_Own", plans_name="nnUNetPlans")
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("Dataset001_x/**__*__[/fold_0/checkpoint_final.pth", b"weights")
        archive.writestr("Dataset001_x/**__*__[/plans.json", b'{"plans_name": "otherPlans"}')
    assert fetch_model.local_dataset(path) == "Dataset001_x"
    with zipfile.ZipFile(path, "w"):
        pass
    with pytest.raises(WireError, match="no checkpoint"):
        fetch_model.local_dataset(path)


@pytest.mark.parametrize("own", ["Dataset001_Liver", "Dataset205_Cor"])
def test_the_model_is_installed_under_the_sites_own_name(finished, tmp_path, monkeypatch, capsys, roots, own):
    use_credential(monkeypatch, tmp_path, finished, "A")
    give_plans(roots["nnUNet_preprocessed"], own)
    give_plans(roots["nnUNet_preprocessed"], "Dataset300_Unrelated", transpose_forward=[2, 1, 0])
    assert fetch_model.main([RUN]) == 0
    assert f"nnUNetv2_fed_fetch_model {RUN} --install" in capsys.readouterr().out
    assert fetch_model.main([RUN, "--install"]) == 0
    text = capsys.readouterr().out
    assert f"as a model of {own}" in text and f"nnUNetv2_predict -d {own} " in text
    assert [path.name for path in roots["nnUNet_results"].iterdir()] == [own]
    model = MODEL.partition("/")[2]
    assert (roots["nnUNet_results"] / own / model / "fold_0" / "checkpoint_final.pth").is_file()
    with pytest.raises(FederationError, match=f"{own}.*is there already"):
        fetch_model.main([RUN, "--install"])


def test_an_id_that_is_another_datasets_stays_unambiguous(finished, tmp_path, monkeypatch, capsys, roots):
    use_credential(monkeypatch, tmp_path, finished, "A")
    (roots["nnUNet_raw"] / "Dataset001_Liver").mkdir(parents=True)
    with pytest.raises(FederationError, match="the id 1 is that of Dataset001_Liver: nothing was installed"):
        fetch_model.main([RUN, "-o", "m.zip", "--install", "--replace"])
    assert fetch_model.main([RUN, "-o", "m.zip"]) == 0
    text = capsys.readouterr().out
    assert "the id 1 is that of Dataset001_Liver" in text and "install_pretrained" not in text
    assert not roots["nnUNet_results"].exists() or not list(roots["nnUNet_results"].iterdir())
    assert (tmp_path / "m.zip").is_file()


def test_of_several_datasets_with_the_same_plans_none_is_chosen(finished, tmp_path, monkeypatch, roots):
    use_credential(monkeypatch, tmp_path, finished, "A")
    for name in ("Dataset205_Cor", "Dataset206_Copy"):
        give_plans(roots["nnUNet_preprocessed"], name)
    with pytest.raises(FederationError, match="have the plans of the model: Dataset205_Cor, Dataset206_Copy"):
        fetch_model.main([RUN, "--install"])
