"""What sites declare of their privacy: on the wire, in records, models, page and status."""

from __future__ import annotations

import json
import zipfile
from contextlib import ExitStack

import pytest
from fake_federation import make_registration, make_settings, make_weights, served, wait_until

from nnunetv2.federated.commands import status as status_command
from nnunetv2.federated.coordinator.dashboard.overview import OverviewBuilder
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.declared_privacy import describe_privacy, privacy_record
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.keys import InitialKey, RegistrationKey, RoundKey
from nnunetv2.federated.site.participant import Participant

RUN = "3d_fullres.fold_0.nnUNetTrainerFake"


def make_declaration(**others) -> messages.PrivacyDeclaration:
    values = {"unit": "patient", "epsilon": 8.0, "delta": 1e-4, "sigma": 1.5, "lot": 8, "clip": 1.0, "steps": 2500}
    return messages.PrivacyDeclaration(**{**values, "accountant": "dp-accounting 0.6.0, PLD", **others})


def test_without_privacy_a_registration_travels_as_before():
    content = make_registration().model_dump(mode="json")
    assert "privacy" not in content
    assert messages.Registration.model_validate_json(json.dumps(content)).privacy is None


def test_a_declaration_survives_the_wire():
    declared = make_registration(privacy=make_declaration(uncovered=("plans",)))
    assert messages.Registration.model_validate_json(declared.model_dump_json()) == declared


@pytest.mark.parametrize(
    "changes", [{"epsilon": 0}, {"delta": 1}, {"unit": "patch"}, {"lot": 0}, {"sigma": float("inf")}]
)
def test_declarations_that_mean_nothing_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        make_declaration(**changes)


def test_a_line_says_who_declares_what():
    declared = {
        "A": make_declaration(),
        "B": make_declaration(),
        "C": make_declaration(epsilon=3.0, unit="scan", uncovered=("plans",)),
        "D": None,
    }
    assert describe_privacy(declared) == (
        "differential privacy, declared by the sites: epsilon 8 per patient (delta 0.0001) at A, B; epsilon 3 per scan "
        "(delta 0.0001, plans not covered) at C; none at D"
    )
    assert describe_privacy({"A": None}) == ""


def test_the_largest_epsilon_is_on_top_where_there_is_one():
    both = {"A": make_declaration(), "B": make_declaration(epsilon=3.0)}
    assert privacy_record(both)["largest_epsilon"] == 8.0
    assert privacy_record({**both, "C": None})["largest_epsilon"] is None
    assert privacy_record({**both, "C": make_declaration(unit="scan")})["largest_epsilon"] is None
    assert privacy_record({"A": None}) is None


def train(federation, declarations) -> None:
    """Let sites register and exchange one round."""
    with ExitStack() as stack:
        clients = {site: stack.enter_context(federation.client(site)) for site in declarations}
        take_part(clients, declarations)


def take_part(clients, declarations) -> None:
    for site, declared in declarations.items():
        clients[site].contribute(RegistrationKey(RUN), make_registration(privacy=declared))
    for key in (InitialKey(RUN), RoundKey(RUN, 0)):
        for site, client in clients.items():
            match = client.result(RegistrationKey(RUN)).message
            weights = make_weights(0)
            names = {
                name: sites[site]
                for name, sites in match.shared.items()
                if key != InitialKey(RUN) or match.initial_owner[name] == site
            }
            client.contribute(key, messages.Update(), {name: weights[local] for name, local in names.items()})
        clients["A"].result(key)


def test_records_model_page_and_status_say_who_declares_it(tmp_path, capsys, monkeypatch):
    declarations = {"A": make_declaration(), "B": make_declaration(epsilon=3.0, uncovered=("plans",))}
    with served(tmp_path / "federation", make_settings(num_epochs=1)) as federation:
        train(federation, declarations)
        wait_until(lambda: federation.coordinator.state.store.load_events("model"))
        (record,) = federation.state.store.load_rounds(RUN)
        assert record["sites"]["B"]["declared_privacy"]["epsilon"] == 3.0
        (archive,) = (tmp_path / "federation").rglob("*.zip")
        with zipfile.ZipFile(archive) as content:
            (name,) = [name for name in content.namelist() if name.endswith("/privacy.json")]
            kept = json.loads(content.read(name))
        assert (kept["declared_by"], kept["largest_epsilon"], kept["uncovered"]) == ("the sites", 8.0, ["plans"])
        line = "declared by the sites: epsilon 8 per patient (delta 0.0001) at A; epsilon 3 per patient"
        assert line in OverviewBuilder(federation.coordinator).build().runs[0].privacy
        monkeypatch.setenv("nnUNet_fed_site", str(tmp_path / "federation" / "credential.A.json"))
        monkeypatch.chdir(tmp_path)
        assert status_command.main([]) == 0
        assert line in capsys.readouterr().out


def test_without_privacy_nothing_is_said_of_it(tmp_path):
    with served(tmp_path / "federation", make_settings(num_epochs=1)) as federation:
        train(federation, {"A": None, "B": None})
        wait_until(lambda: federation.coordinator.state.store.load_events("model"))
        (record,) = federation.state.store.load_rounds(RUN)
        assert all("declared_privacy" not in site for site in record["sites"].values())
        (archive,) = (tmp_path / "federation").rglob("*.zip")
        with zipfile.ZipFile(archive) as content:
            assert not any(name.endswith("/privacy.json") for name in content.namelist())
        assert federation.coordinator.declared_privacy().runs == ()
        assert OverviewBuilder(federation.coordinator).build().runs[0].privacy == ""


def test_a_site_that_returns_may_have_other_noise_but_keeps_its_promise(tmp_path):
    with served(tmp_path / "federation", make_settings()) as federation:
        train(federation, {"A": make_declaration(), "B": None})
        with federation.client("A") as client:
            again = make_registration(privacy=make_declaration(sigma=2.0, steps=2600))
            Participant(client, site="A", run=RUN).register(again)
            with pytest.raises(RefusedError, match="privacy.epsilon"):
                Participant(client, site="A", run=RUN).register(
                    make_registration(privacy=make_declaration(epsilon=9.0))
                )
