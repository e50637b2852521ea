"""What a job may ask for, and what server and sites let it do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nnunetv2.federated.commands.engine import main
from nnunetv2.federated.engine.nvflare.job import CLASSES
from nnunetv2.federated.engine.plan import (
    CoordinatorTask,
    SiteFile,
    SiteTask,
    check_allowed,
    check_given,
    commands_of,
    given_of_task,
    parse_task,
    read_server_file,
    read_site_file,
    settings_of_task,
)
from nnunetv2.federated.errors import FederationError, WireError


def make_site(**others) -> SiteFile:
    return SiteFile(**{"folder": "/srv/site", "dataset": "101", "environment": {}, **others})


@pytest.mark.parametrize(
    ("model", "task"),
    [
        (SiteTask, {"federation": "liver", "command": ["rm"]}),
        (SiteTask, {"federation": "liver", "dataset": "1"}),
        (SiteTask, {"federation": "liver", "environment": {"nnUNet_raw": "/"}}),
        (SiteTask, {"federation": "liver", "steps": ["predict"]}),
        (SiteTask, {"federation": "../liver"}),
        (SiteTask, {"federation": "liver", "fold": "../0"}),
        (SiteTask, {"federation": "liver", "trainer": "a/b"}),
        (SiteTask, {}),
        (CoordinatorTask, {"federation": "liver", "folder": "/"}),
        (CoordinatorTask, {"federation": "liver/../.."}),
        (CoordinatorTask, "liver"),
    ],
)
def test_a_job_names_a_federation_and_steps_and_nothing_else(model, task):
    with pytest.raises(FederationError, match="the job is none that nnUNetv2_fed_engine job has written"):
        parse_task(model, task)


@pytest.mark.parametrize("name", ["federation", "sites", "initial_weights"])
def test_some_settings_are_not_a_jobs_to_choose(name):
    with pytest.raises(FederationError, match=f"must not choose {name}"):
        check_given(parse_task(CoordinatorTask, {"federation": "liver", "settings": {name: "x"}}))


def test_settings_are_checked_as_those_of_a_command_line():
    task = parse_task(CoordinatorTask, {"federation": "liver", "settings": {"num_epochs": 5, "secure": {"k": 3}}})
    settings = settings_of_task(task, ("A", "B", "C"))
    assert (settings.federation, settings.num_epochs, settings.min_sites) == ("liver", 5, 3)
    assert given_of_task(task).keys() == {"num_epochs", "secure", "geometry"}
    assert settings_of_task(CoordinatorTask(federation="x"), ("A", "B")).num_epochs == 1000
    with pytest.raises(FederationError, match="at least two sites"):
        settings_of_task(CoordinatorTask(federation="x"), ("A",))
    for wrong in ({"epochs": 5}, {"num_epochs": "5"}, {"num_epochs": 0}):
        with pytest.raises(WireError, match="the settings of the job"):
            settings_of_task(CoordinatorTask(federation="x", settings=wrong), ("A", "B"))
        with pytest.raises(WireError, match="the settings of the job"):
            given_of_task(CoordinatorTask(federation="x", settings=wrong))


@pytest.mark.parametrize(
    ("wanted", "allowed", "what"),
    [
        ({"steps": ("train",)}, {"steps": ("plan",)}, "step train"),
        ({"configuration": "2d"}, {}, "configuration 2d"),
        ({"fold": "1"}, {"folds": ("0",)}, "fold 1"),
        ({"trainer": "nnUNetTrainerFedAvg"}, {}, "trainer nnUNetTrainerFedAvg"),
    ],
)
def test_a_site_says_what_a_job_may_ask_for(wanted, allowed, what):
    with pytest.raises(FederationError, match=rf"the job wants {what}, this site allows .*: /kit/nnunet_site.json"):
        check_allowed(SiteTask(federation="x", **wanted), make_site(**allowed), Path("/kit/nnunet_site.json"))
    check_allowed(SiteTask(federation="x"), make_site(), Path("file"))


def test_commands_are_those_that_people_type(tmp_path):
    site = make_site(device="cpu", plan_options=("-np", "1"), environment={"nnUNet_results": str(tmp_path)})
    task = SiteTask(federation="x", fold="2")
    plan, train = commands_of(task, site)
    assert " ".join(plan) == "nnUNetv2_plan_and_preprocess -d 101 --federated ffe -c 3d_fullres -np 1"
    assert train == [
        "nnUNetv2_train",
        *["101", "3d_fullres", "2", "-tr", "nnUNetTrainerAsymFedAvg", "-p", "nnUNetPlans", "-device", "cpu"],
    ]
    fold = tmp_path / "Dataset101_Liver" / "nnUNetTrainerAsymFedAvg__nnUNetPlans__3d_fullres" / "fold_2"
    fold.mkdir(parents=True)
    (fold / "checkpoint_latest.pth").touch()
    assert commands_of(SiteTask(federation="x", fold="2", steps=("train",)), site) == [[*train, "--c"]]


def test_commands_are_those_of_one_folder(tmp_path):
    assert make_site(commands=str(tmp_path)).commands_folder == tmp_path
    assert make_site().commands_folder == Path(sys.executable).parent


def test_a_training_goes_on_where_its_results_are_whoever_says_where_that_is(tmp_path, monkeypatch):
    fold = Path("Dataset101_Liver", "nnUNetTrainerAsymFedAvg__nnUNetPlans__3d_fullres", "fold_0")
    (tmp_path / "results" / fold).mkdir(parents=True)
    (tmp_path / "results" / fold / "checkpoint_latest.pth").touch()
    task = SiteTask(federation="x", steps=("train",))
    monkeypatch.delenv("nnUNet_results", raising=False)
    assert "--c" not in commands_of(task, make_site())[0]
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    assert "--c" in commands_of(task, make_site())[0]
    elsewhere = make_site(environment={"nnUNet_results": str(tmp_path / "elsewhere")})
    assert "--c" not in commands_of(task, elsewhere)[0], "the site's file overrules the environment"


def test_files_that_are_missing_or_wrong_are_named(tmp_path):
    with pytest.raises(FederationError, match=r"nnunet_server.json is missing: .*nnUNetv2_fed_engine server"):
        read_server_file(tmp_path)
    (tmp_path / "nnunet_site.json").write_text(json.dumps({"folder": "here", "dataset": "1", "environment": {}}))
    with pytest.raises(FederationError, match=r"nnunet_site.json cannot be used: .*absolute"):
        read_site_file(tmp_path)


# --------------------------------------------------------------------------------------------------------- the command
@pytest.fixture
def kit(tmp_path):
    """A startup kit for both kinds of participants, with the part of it that the command looks at."""
    for name in ("fed_server.json", "fed_client.json"):
        (tmp_path / "kit" / "startup").mkdir(parents=True, exist_ok=True)
        (tmp_path / "kit" / "startup" / name).write_text("{}")
    (tmp_path / "kit" / "local").mkdir()
    (tmp_path / "kit" / "local" / "resources.json.default").write_text('{"class_allow_list": []}')
    return tmp_path / "kit"


@pytest.mark.parametrize("kind", ["server", "site"])
def test_the_line_to_allow_is_printed_alone(kind, capsys):
    assert main(["allow", kind]) == 0
    assert capsys.readouterr().out == f'"{CLASSES[kind]}",\n'


def test_a_site_is_prepared(kit, tmp_path, capsys):
    (tmp_path / "raw" / "Dataset101_Liver").mkdir(parents=True)
    options = ["--kit", str(kit), "--dataset", "101", "--device", "cpu", "--steps", "train"]
    assert main(["site", *options, "--env", f"nnUNet_raw={tmp_path / 'raw'}"]) == 0
    said = capsys.readouterr().out
    assert "Jobs are refused until" in said and CLASSES["site"] in said
    site = read_site_file(kit / "local")
    assert (site.dataset, site.steps, site.folder) == ("101", ("train",), str(tmp_path / "kit-nnunet"))
    (kit / "local" / "resources.json").write_text(json.dumps({"class_allow_list": [CLASSES["site"]]}))
    assert main(["site", *options, "--env", f"nnUNet_raw={tmp_path / 'raw'}"]) == 0
    assert "Jobs are refused" not in capsys.readouterr().out


def test_further_words_are_split_as_a_shell_does(kit, tmp_path):
    (tmp_path / "raw" / "Dataset101_Liver").mkdir(parents=True)
    words = ["--train-options=-pretrained_weights '/my models/first.pth' --npz", "--plan-options=-np 1"]
    options = ["--kit", str(kit), "--dataset", "101", "--env", f"nnUNet_raw={tmp_path / 'raw'}"]
    assert main(["site", *options, *words]) == 0
    site = read_site_file(kit / "local")
    assert site.train_options == ("-pretrained_weights", "/my models/first.pth", "--npz")
    assert site.plan_options == ("-np", "1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--kit": "nowhere"}, "no startup kit of a site"),
        ({"--train-options": "'my plans"}, "--train-options 'my plans: No closing quotation"),
        ({"--dataset": "102"}, "there is no dataset 102 below"),
        ({"--env": "nnUNet_raw"}, "--env takes NAME=VALUE"),
    ],
)
def test_what_cannot_be_prepared_is_said(kit, tmp_path, change, message):
    (tmp_path / "raw" / "Dataset101_Liver").mkdir(parents=True)
    options = {"--kit": str(kit), "--dataset": "101", "--env": f"nnUNet_raw={tmp_path / 'raw'}", **change}
    with pytest.raises(FederationError, match=message):
        main(["site", *(word for pair in options.items() for word in pair)])
    assert not (kit / "local" / "nnunet_site.json").exists()


def test_federations_lie_outside_of_the_kit(kit, tmp_path):
    with pytest.raises(FederationError, match="lies in the startup kit"):
        main(["server", "--kit", str(kit), "--folder", str(kit / "federations")])
    assert main(["server", "--kit", str(kit), "--folder", str(tmp_path / "federations"), "--port", "0"]) == 0
    assert read_server_file(kit / "local").folder == str(tmp_path / "federations")


def test_a_job_is_written_once(tmp_path):
    options = ["job", str(tmp_path / "job"), "--federation", "liver", "--epochs", "7", "--secure", "--sites", *"ABC"]
    assert main(options) == 0
    config = json.loads((tmp_path / "job" / "app" / "config" / "config_fed_server.json").read_text())
    task = parse_task(CoordinatorTask, config["workflows"][0]["args"]["task"])
    assert settings_of_task(task, ("A", "B", "C")).secure.k == 3
    client = json.loads((tmp_path / "job" / "app" / "config" / "config_fed_client.json").read_text())
    assert parse_task(SiteTask, client["executors"][0]["executor"]["args"]["task"]).federation == "liver"
    meta = json.loads((tmp_path / "job" / "meta.json").read_text())
    assert meta["deploy_map"] == {"app": ["server", "A", "B", "C"]} and meta["min_clients"] == 3
    with pytest.raises(FederationError, match="holds something already"):
        main(options)
    with pytest.raises(FederationError, match="quorum"):
        main(["job", str(tmp_path / "other"), "--federation", "x", "--quorum", "2", "--sites", "A", "B", "C"])


def test_a_job_has_no_option_for_files(capsys):
    with pytest.raises(SystemExit):
        main(["job", "OUT", "--federation", "liver", "--initial-weights", "x.pth"])
    assert "unrecognized arguments: --initial-weights x.pth" in capsys.readouterr().err
