"""The routes of a site, in front of a service that is no coordinator."""

from __future__ import annotations

import asyncio
import json

from asgi_caller import call
from fake_federation import RUN, make_settings

from nnunetv2.federated.coordinator.http.services import Services
from nnunetv2.federated.coordinator.http.site_routes import build_site_app
from nnunetv2.federated.coordinator.members import Member
from nnunetv2.federated.coordinator.notifier import Notifier
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.protocol import api
from nnunetv2.federated.protocol.keys import CensusKey


class Gateway:
    """The part of a `SiteService` that this test asks for; its coordinator is elsewhere."""

    def __init__(self) -> None:
        self.notifier = Notifier()
        self.settings = make_settings()
        self.counted: list[tuple[str, str]] = []

    def authenticate(self, token: str) -> Member:
        if token != "A.secret":
            raise RefusedError("nobody knows this credential", code="unauthorized")
        return Member("A", "site")

    def count_traffic(self, member: str, key: str, *, received: int, sent: int) -> None:
        self.counted.append((member, key))

    def run_state(self, run: str) -> api.RunState:
        return api.RunState(run=run, open_round=7)

    def result(self, key: str, site: str) -> api.Waiting:
        raise OSError("the coordinator cannot be reached")


def test_a_site_is_served_by_whatever_stands_in_for_its_coordinator():
    gateway = Gateway()
    services = Services(gateway)
    app = build_site_app(services)

    async def ask(path: str, token: str = "A.secret") -> tuple[int, dict]:
        answer = await call(app, "GET", path, token=token)
        return answer.status, json.loads(answer.body)

    async def scenario() -> None:
        assert await ask("/v1/settings") == (200, gateway.settings.model_dump(mode="json"))
        assert (await ask(f"/v1/runs/{RUN}"))[1]["open_round"] == 7
        assert (await ask("/v1/settings", token="A.other"))[0] == 401
        status, problem = await ask(f"/v1/gatherings/{CensusKey()}")
        assert (status, problem["code"]) == (503, "coordinator_trouble")
        assert (await ask("/v1/members"))[0] == 404, "operators ask the coordinator itself"

    asyncio.run(scenario())
    assert gateway.counted == [("A", ""), ("A", ""), ("A", str(CensusKey()))]
    assert services.refusals == {"unauthorized": 1, "coordinator_trouble": 1}
