"""Operators of a federation that a job of an engine runs."""

from __future__ import annotations

import time

import pytest
from fake_federation import make_settings

from nnunetv2.federated.commands.admin import main as admin_command
from nnunetv2.federated.commands.coordinator import main as coordinator_command
from nnunetv2.federated.commands.status import main as status_command
from nnunetv2.federated.coordinator.members import create_federation
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.engine.operators import OperatorServer
from nnunetv2.federated.errors import FederationError, RefusedError


def test_operators_are_served_on_the_servers_machine_while_the_job_runs(tmp_path, capsys):
    folder = tmp_path / "federation"
    with Store(folder) as store:
        create_federation(store, make_settings(), now=time.time(), membership="engine")
        server = OperatorServer(Coordinator(store, log=lambda line: None), 0)
        server.start()
        try:
            assert server.url.startswith("http://127.0.0.1:")
            assert (folder / "operator.json").stat().st_mode & 0o777 == 0o600
            assert status_command(["--folder", str(folder)]) == 0
            said = capsys.readouterr().out
            assert "A" in said and "B" in said
            with pytest.raises(RefusedError, match="come through NVFlare: C cannot be invited"):
                admin_command(["--folder", str(folder), "invite", "C"])
            assert admin_command(["--folder", str(folder), "invite", "eve", "--role", "observer"]) == 0
            capsys.readouterr()
            assert admin_command(["--folder", str(folder), "revoke", "B"]) == 0
            assert "`invite B` lets it back in" in capsys.readouterr().out
            assert admin_command(["--folder", str(folder), "invite", "B"]) == 0
            assert capsys.readouterr().out.startswith("B takes part again")
        finally:
            server.stop()
        assert not (folder / "operator.json").exists()


def test_a_coordinator_does_not_serve_the_federation_of_an_engine(tmp_path):
    folder = tmp_path / "federation"
    with Store(folder) as store:
        create_federation(store, make_settings(), now=time.time(), membership="engine")
    with pytest.raises(FederationError, match="whose sites come through NVFlare"):
        coordinator_command(["--folder", str(folder), "--port", "0"])
