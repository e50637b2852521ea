"""What a member is told about the federation."""

from __future__ import annotations

import json
import re

import pytest
from fake_federation import LABELS, RUN, in_threads, make_census, make_plans, make_settings, served, train, wait_until

from nnunetv2.federated.commands import leave, status
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.protocol import api, messages
from nnunetv2.federated.protocol.keys import CensusKey, PlansKey, RoundKey, ValidationKey

NOW = 1_000_000.0


def make_status(**changes) -> api.Status:
    state = api.RunState(
        run=RUN,
        state="running",
        num_rounds=1000,
        rounds_closed=17,
        open_round=17,
        registered=("north", "south"),
        members=("north", "south"),
    )
    progress = api.RunProgress(
        run=RUN,
        last_closed=NOW - 900,
        round_s=240.0,
        validation=api.ValidationStatus(
            round=16, dice=(0.8, None), mean_dice=0.8, ema_dice=0.79, best_round=12, best_ema_dice=0.81
        ),
    )
    waiting = api.GatheringStatus(
        key=RoundKey(RUN, 17), contributed=("north",), waiting_for=("south",), opened=NOW - 720
    )
    return api.Status(
        **{
            "federation": "liver",
            "time": NOW,
            "runs": (state,),
            "progress": (progress,),
            "waiting": (waiting,),
            "sites": (
                api.SiteStatus(
                    site="north",
                    joined=True,
                    state="active",
                    last_seen=NOW - 5,
                    bytes_received=2_500_000,
                    bytes_sent=1_000_000,
                ),
                api.SiteStatus(site="south", joined=False),
            ),
            "failures": (api.FailureStatus(site="south", run=RUN, round=16, reason="OutOfMemoryError", time=NOW),),
            **changes,
        }
    )


def text_of(found: api.Status) -> str:
    return "\n".join(status.describe(found, url="https://there"))


def test_times_that_no_clock_shows_are_told_all_the_same():
    """A coordinator may say anything."""
    found = make_status(
        time=1e308,
        progress=(),
        waiting=(api.GatheringStatus(key=CensusKey(), contributed=(), waiting_for=("north",), opened=-1e308),),
        failures=(api.FailureStatus(site="south", run=RUN, round=16, reason="OutOfMemoryError", time=-1e308),),
    )
    text = text_of(found)
    assert "at https://there, 1e+308 s after 1970" in text and "waiting for north since ages" in text
    assert f"run {RUN}: running, 17 of 1000 rounds closed" in text


def test_a_wait_is_named():
    text = text_of(make_status())
    assert "waiting for south since 12 min: round 17 (north contributed)" in text
    assert f"run {RUN}: running, 17 of 1000 rounds closed; 4 min per round, about 2 d 17 h left" in text
    assert "last validation, round 16: pseudo Dice 0.8000, moving average 0.7900; best 0.8100 after round 12" in text
    assert "per class 0.8000, unknown" in text
    assert "site north: heard of 5 s ago; it has sent 2.5 MB and got 1.0 MB" in text
    assert "site south: invited, has not joined yet" in text
    assert f"site south failed in round 16 of run {RUN}: OutOfMemoryError" in text


def test_while_all_train_nobody_is_waited_for():
    assert "all train since 15 min: round 17" in text_of(make_status(waiting=()))


def test_planning_is_shown_too():
    census = api.GatheringStatus(key=CensusKey(), contributed=(), waiting_for=("north", "south"), opened=NOW - 60)
    text = text_of(make_status(runs=(), progress=(), waiting=(census,)))
    assert "waiting for north, south since 1 min: fingerprint/census" in text


def test_what_was_refused_is_not_called_a_wait():
    census = api.GatheringStatus(
        key=CensusKey(),
        contributed=("north", "south"),
        waiting_for=(),
        opened=NOW - 60,
        refusal="labels.liver is 1 at north and 2 at south. Make dataset.json agree.",
    )
    text = text_of(make_status(runs=(), progress=(), waiting=(census,)))
    assert (
        "fingerprint/census is refused, until a site sends something else or is revoked: labels.liver is 1 at north"
        in text
    )
    assert "not closed yet" not in text


@pytest.mark.slow
def test_any_member_may_ask_and_a_site_may_leave(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with served(tmp_path / "federation", make_settings(sites=("A", "B", "C"), num_epochs=2)) as federation:

        def take_part(site, seed):
            with federation.client(site) as client:
                return train(client, seed=seed, num_rounds=2)

        in_threads(*(lambda site=site, seed=seed: take_part(site, seed) for seed, site in enumerate("ABC")))
        with federation.client("A") as client, federation.client("B") as other, federation.client("C") as third:
            for one in (client, other, third):
                one.contribute(ValidationKey(RUN, 1), messages.Validation(tp=(8,), fp=(2,), fn=(2,)))
            wait_until(lambda: federation.state.store.load_validations(RUN))
            client.contribute(CensusKey(), make_census(labels=LABELS))
            for one, plans in ((client, make_plans(a=1)), (other, make_plans(a=2)), (third, make_plans(a=2))):
                one.contribute(PlansKey("p"), messages.PlansReport(plans=plans))
            wait_until(lambda: federation.state.registry.get(PlansKey("p")).refusal)
        monkeypatch.setenv("nnUNet_fed_site", str(tmp_path / "federation" / "credential.A.json"))
        assert status.main([]) == 0
        text = capsys.readouterr().out
        assert f"run {RUN}: complete, 2 of 2 rounds closed" in text and "pseudo Dice 0.8000" in text
        assert re.search(r"waiting for B, C since [0-9]+ \w+: fingerprint/census \(A contributed\)", text)
        assert (
            "plans/p is refused, until a site sends something else or is revoked: the plans differ: plans.a is not the "
            in text
        )
        assert status.main(["--json"]) == 0
        content = json.loads(capsys.readouterr().out)
        assert content["progress"][0]["round_s"] is not None and content["runs"][0]["state"] == "complete"
        assert leave.main([RUN]) == 0
        assert f"Site A has left run {RUN}; it goes on with B, C" in capsys.readouterr().out
        with pytest.raises(RefusedError, match="there is no run"):
            leave.main(["none"])


def test_a_site_sees_no_scores_of_single_sites():
    assert not {"dice_of_site", "loss_of_site", "metrics"} & api.ValidationStatus.model_fields.keys()
