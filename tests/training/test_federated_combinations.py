"""Every pair of what operator and site may choose: it trains to the end, or is refused by name before it begins."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_federation import make_settings, served
from federated_sites import run_of, weights_of
from seeded_sites import Seeded, assert_same
from site_processes import finish, fold_folder, start
from tiny_dataset import NAME, make_tiny_dataset
from trained_sites import FINETUNED, HEADS, found_with_weights, train

from nnunetv2.federated.commands import coordinator
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.privacy.ledger import LEDGER_FILE, Budget, set_budget
from nnunetv2.federated.protocol.api import Secure
from nnunetv2.training.differential_privacy.options import PrivacyOptions
from nnunetv2.training.differential_privacy.refusals import PrivacyRefusedError, check_process
from nnunetv2.training.nnUNetTrainer.variants.federated.nnUNetTrainerFedAvg import (
    nnUNetTrainerAsymFedAvg,
    nnUNetTrainerAsymFedAvgOverlapped,
    nnUNetTrainerFedAvg,
)
from nnunetv2.training.nnUNetTrainer.variants.privacy.nnUNetTrainerDPAsymFedAvg import nnUNetTrainerDPAsymFedAvg

COMMAND_LINE = {
    "exchange_every": ("--exchange-every", "2"),
    "float16": ("--precision", "float16"),
    "int8": ("--precision", "int8"),
    "proximal": ("--proximal", "0.1"),
    "keep_local": ("--keep-local", "head"),
    "finetune": ("--finetune-epochs", "1"),
    "initial_weights": ("--initial-weights", "WEIGHTS"),
    "secure": ("--secure",),
}
SETTINGS = {
    "exchange_every": {"exchange_every": 2},
    "float16": {"precision": "float16"},
    "int8": {"precision": "int8"},
    "proximal": {"proximal": 0.1},
    "keep_local": {"keep_local": "head"},
    "finetune": {"finetune_epochs": 1},
    "secure": {"secure": Secure(k=3), "min_sites": 3},
}
TRAINERS = {
    "asym": nnUNetTrainerAsymFedAvg,
    "equal_plans": nnUNetTrainerFedAvg,
    "overlapped": nnUNetTrainerAsymFedAvgOverlapped,
    "private": nnUNetTrainerDPAsymFedAvg,
}
PROCESSES = "processes"
"""Several of one site, `-num_gpus 2`."""

ONE_OF = [{"float16", "int8"}, set(TRAINERS)]
"""Nobody can choose two of these."""
REFUSED_AT_THE_FIRST_START = {
    ("int8", "secure"): "--precision int8 does not go with --secure",
    ("float16", "keep_local", "secure"): "--keep-local head does not go with --secure and --precision float16",
}
REFUSED_AT_A_SITE = {
    ("finetune", "private"): "--finetune-epochs 1 does not go with nnUNetTrainerDPAsymFedAvg",
    ("private", PROCESSES): "with several processes",
}
METHODS = {"exchange_every", "proximal", "keep_local", "finetune", "initial_weights"}
IN_THREADS = [
    *({*METHODS, precision, trainer} for precision in ("int8", "float16") for trainer in ("asym", "overlapped")),
    {*METHODS, "int8", "equal_plans"},
    {*METHODS, "float16", "equal_plans"},
    {*METHODS - {"finetune"}, "int8", "private"},
    {*METHODS - {"finetune"}, "float16", "private"},
]
IN_PROCESSES = [
    {*METHODS, "secure", "asym", PROCESSES},
    {*METHODS - {"keep_local"}, "secure", "float16", "overlapped", PROCESSES},
    {"secure", "equal_plans", "exchange_every", PROCESSES},
    {*METHODS, "int8", "asym", PROCESSES},
]
NOT_TRAINED_HERE = {("private", "secure")}
"""Whose parts are each trained with all else: masks hide what leaves, and noise is in it already."""


def test_every_pair_is_decided():
    choices = sorted({*COMMAND_LINE, *TRAINERS, PROCESSES})
    trained = [*IN_THREADS, *IN_PROCESSES]
    for pair in itertools.combinations(choices, 2):
        ways = (
            any(set(pair) <= one for one in ONE_OF),
            pair in REFUSED_AT_THE_FIRST_START,
            pair in REFUSED_AT_A_SITE,
            pair in NOT_TRAINED_HERE,
            any(set(pair) <= one for one in trained),
        )
        assert sum(ways) == 1, (pair, ways)


# ----------------------------------------------------------------------------------------------------- the first start
@pytest.fixture(scope="module")
def weights_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"network_weights": {"encoder.weight": torch.ones(2, 2)}}, path)
    return path


def found(folder: Path, options, weights_file: Path):
    words = [str(weights_file) if word == "WEIGHTS" else word for one in options for word in COMMAND_LINE[one]]
    arguments = coordinator.build_parser().parse_args(["--folder", str(folder), "--sites", "A", "B", "C", *words])
    with Store(arguments.folder) as store:
        return coordinator.open_federation(
            store, coordinator.given_settings(arguments), initial_weights=arguments.initial_weights
        )


@pytest.mark.parametrize("pair", list(itertools.combinations(sorted(COMMAND_LINE), 2)), ids="-".join)
def test_the_first_start_takes_a_pair_or_names_it(tmp_path, weights_file, pair):
    if {*pair} in ONE_OF:
        return
    refusal = REFUSED_AT_THE_FIRST_START.get(pair)
    if refusal is None:
        settings = found(tmp_path / "f", pair, weights_file).model_dump()
        for one in pair:
            for name, value in SETTINGS.get(one, {}).items():
                assert settings[name] == (value.model_dump() if isinstance(value, Secure) else value)
        return
    with pytest.raises(FederationError, match=refusal):
        found(tmp_path / "f", pair, weights_file)


def test_the_first_start_refuses_what_16_bits_cannot_bring(tmp_path, weights_file):
    ((three, refusal),) = [item for item in REFUSED_AT_THE_FIRST_START.items() if len(item[0]) == 3]
    with pytest.raises(FederationError, match=refusal):
        found(tmp_path / "f", three, weights_file)


def test_weights_that_could_not_travel_found_no_federation(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"network_weights": {"encoder.weight": torch.full((2,), 1e6)}}, path)
    with pytest.raises(FederationError, match="tensor encoder.weight: a value of size 1e\\+06 does not fit"):
        found(tmp_path / "f", ("initial_weights", "float16"), path)
    assert not list((tmp_path / "f").rglob("*.safetensors*"))
    assert found(tmp_path / "f", ("initial_weights", "int8"), path).precision == "int8"


# ------------------------------------------------------------------------------------------------------------- at sites
def seeded(trainer_class):
    """Return a trainer of this name whose batches do not depend on other threads."""
    if trainer_class is nnUNetTrainerAsymFedAvg:
        return Seeded
    return type(trainer_class.__name__, (trainer_class, Seeded), {"get_dataloaders": Seeded.get_dataloaders})


def settings_of(choices, folder: Path, make_sites) -> dict:
    settings = {name: value for one in sorted(choices & SETTINGS.keys()) for name, value in SETTINGS[one].items()}
    if "initial_weights" in choices:
        torch.manual_seed(5)  # equal weights in all federations
        source = make_sites(folder=f"source_of_{folder.name}").trainer("A", Seeded)
        settings |= found_with_weights(folder, source)
    return settings


def make_private(sites, site: str):
    """Return a trainer of a site with enough patients and a budget."""
    preprocessed = sites.folder / site / "nnUNet_preprocessed"
    make_tiny_dataset(preprocessed, cases=24)
    cases = [f"case_{number:02}" for number in range(24)]
    (preprocessed / NAME / "splits_final.json").write_text(json.dumps([{"train": cases[:21], "val": cases[21:]}]))
    set_budget(preprocessed / NAME / LEDGER_FILE, Budget(epsilon=50.0, delta=1e-3), by="A. Weiss")
    trainer = sites.trainer(site, nnUNetTrainerDPAsymFedAvg)
    trainer.privacy_options = PrivacyOptions(sigma=30.0)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("choices", IN_THREADS, ids=lambda one: "-".join(sorted(one)))
def test_all_that_goes_together_trains_to_the_end(make_sites, tmp_path, choices):
    settings = settings_of(choices, tmp_path / "site", make_sites)
    sites = make_sites(folder="site", num_epochs=3, validate_every=1, **settings)
    ((_, trainer_class),) = [item for item in TRAINERS.items() if item[0] in choices]
    trainers = [
        make_private(sites, site) if "private" in choices else sites.trainer(site, seeded(trainer_class))
        for site in "AB"
    ]
    assert sites.run(*trainers) == [None, None]
    records = sites.federation.state.store.load_rounds(run_of(trainers[0]))
    assert [record["round"] for record in records] == [0, 1]
    first, second = map(weights_of, trainers)
    for name, values in first.items():
        assert np.array_equal(values, second[name]) == (HEADS not in f".{name}"), name
    for trainer in trainers:
        assert Path(trainer.output_folder, FINETUNED).exists() == ("finetune" in choices)
        assert any("1: 0.0 MB each way" in line for line in trainer.lines)  # of a tiny network


@pytest.mark.slow
@pytest.mark.parametrize("dies_in_epoch", [1, 2, 5], ids=["in a round", "in the next one", "while fine-tuning"])
def test_all_together_ends_with_the_same_bits_after_a_kill(make_sites, tmp_path, dies_in_epoch):
    choices = {*METHODS, "int8"}
    ends = {}
    for folder, dies in (("undisturbed", None), ("killed", dies_in_epoch)):
        settings = {"num_epochs": 5, **settings_of(choices, tmp_path / folder, make_sites)}
        ends[folder] = train(make_sites, folder, dies_in_epoch=dies, **settings)
    for name in ("checkpoint_final.pth", FINETUNED):
        assert_same(ends["undisturbed"], ends["killed"], name)


@pytest.mark.slow
def test_a_private_site_refuses_epochs_without_a_budget_before_it_registers(make_sites):
    sites = make_sites(finetune_epochs=1)
    (error,) = sites.run(make_private(sites, "A"))
    assert REFUSED_AT_A_SITE["finetune", "private"] in str(error)
    assert not sites.federation.state.registry.runs()


def test_a_private_site_refuses_several_processes():
    with pytest.raises(PrivacyRefusedError, match=REFUSED_AT_A_SITE["private", PROCESSES]):
        check_process(is_ddp=True, has_grad_scaler=False)


@pytest.mark.slow
@pytest.mark.parametrize("choices", IN_PROCESSES, ids=lambda one: "-".join(sorted(one)))
def test_a_site_of_several_processes_does_all_of_it_too(make_sites, tmp_path, choices):
    names = "ABC" if "secure" in choices else "AB"
    given = settings_of(choices, tmp_path / "site", make_sites)
    ((_, trainer_class),) = [item for item in TRAINERS.items() if item[0] in choices]
    trainer = trainer_class.__name__
    settings = make_settings(
        sites=tuple(names), num_epochs=3, num_iterations_per_epoch=2, num_val_iterations_per_epoch=1, **given
    )
    with served(tmp_path / "site" / "federation", settings) as federation:
        for site in names:
            make_tiny_dataset(tmp_path / site / "nnUNet_preprocessed", cases=5)
        finish(
            start(federation, tmp_path, "A", "3d_fullres", "0", "-num_gpus", "2", trainer=trainer),
            *(start(federation, tmp_path, site, "3d_fullres", "0", trainer=trainer) for site in names[1:]),
        )
        run = f"3d_fullres.fold_0.{trainer}"
        assert [record["round"] for record in federation.state.store.load_rounds(run)] == [0, 1]
        folder = federation.state.store.folder
    folders = {site: fold_folder(tmp_path, site, "3d_fullres", 0, trainer) for site in names}
    ends = [torch.load(folders[site] / "checkpoint_final.pth", weights_only=False) for site in names]
    for name, values in ends[0]["network_weights"].items():
        for other in ends[1:]:
            is_local = "keep_local" in choices and HEADS in f".{name}"
            assert torch.equal(values, other["network_weights"][name]) != is_local, name
    for site in names:
        assert (folders[site] / FINETUNED).exists() == ("finetune" in choices)
        if "secure" in choices:  # the keys of a run that is over are gone
            secure = folder / f"credential.{site}.json.secure"
            assert secure.is_dir() and not list(secure.glob("*/runs/*/**/*.pem"))
