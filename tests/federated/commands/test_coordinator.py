"""The command nnUNetv2_fed_coordinator."""

import errno
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
from fake_federation import PROJECT, CoordinatorProcess, coordinator_process, make_census, make_client, wait_until
from patience import MUCH_LONGER_S, PATIENCE_S

from nnunetv2.federated.commands import coordinator
from nnunetv2.federated.commands.api_client import ask, operator_credential
from nnunetv2.federated.coordinator.http import listen_address
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.coordinator.storage.audit_log import Event
from nnunetv2.federated.coordinator.storage.backup import backup, restore
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.errors import CoordinatorUnreachable, FederationError
from nnunetv2.federated.protocol.api import FederationSettings, InviteRequest
from nnunetv2.federated.protocol.document import open_document
from nnunetv2.federated.protocol.invitation import decode_invitation
from nnunetv2.federated.protocol.keys import CensusKey
from nnunetv2.federated.site.enrolment import join

FULL = Path("/dev/full")


def open_folder(folder, *options):
    """Do what a start does before it listens."""
    arguments = coordinator.build_parser().parse_args(["--folder", str(folder), *options])
    with Store(arguments.folder) as store:
        return coordinator.open_federation(
            store, coordinator.given_settings(arguments), initial_weights=arguments.initial_weights
        )


def test_the_first_start_fixes_the_settings(tmp_path):
    settings = open_folder(
        tmp_path / "f",
        "--sites",
        "south",
        "north",
        "--epochs",
        "20",
        "--iterations",
        "5",
        "--quorum",
        "2",
        "--deadline",
        "90",
        "--matching",
        "resolution",
        "--weighting",
        "uniform",
        "--precision",
        "float16",
    )
    assert settings.sites == ("north", "south")
    assert (settings.num_epochs, settings.num_iterations_per_epoch) == (20, 5)
    assert settings.num_val_iterations_per_epoch is None
    assert (settings.quorum, settings.deadline_s, settings.matching, settings.weighting, settings.precision) == (
        2,
        90.0,
        "resolution",
        "uniform",
        "float16",
    )
    assert open_folder(tmp_path / "f") == settings
    assert open_folder(tmp_path / "f", "--epochs", "20", "--sites", "north", "south") == settings


METHODS = ("--proximal", "0.01", "--keep-local", "norm", "--finetune-epochs", "3", "--labels", "union")


def test_what_sites_do_beside_averaging_is_fixed_by_the_first_start(tmp_path):
    settings = open_folder(tmp_path / "f", "--sites", "A", "B", *METHODS)
    assert (settings.proximal, settings.keep_local, settings.finetune_epochs) == (0.01, "norm", 3)
    assert settings.labels == "union"
    with pytest.raises(FederationError, match="with --labels union, not equal"):
        open_folder(tmp_path / "f", "--labels", "equal")
    assert open_folder(tmp_path / "f", *METHODS) == settings == open_folder(tmp_path / "f")
    with pytest.raises(FederationError, match="with --proximal 0.01, not 0.5"):
        open_folder(tmp_path / "f", "--proximal", "0.5")
    plain = open_folder(tmp_path / "plain", "--sites", "A", "B")
    assert (
        not {"proximal", "keep_local", "finetune_epochs", "initial_weights", "labels"}
        & plain.model_dump(mode="json").keys()
    )


def test_tensors_are_matched_by_resolution_unless_the_operator_wants_it_otherwise(tmp_path):
    own = open_folder(tmp_path / "own", "--sites", "A", "B", "--networks", "own")
    assert (own.networks, own.matching) == ("own", "resolution")
    assert open_folder(tmp_path / "own", "--networks", "own") == own == open_folder(tmp_path / "own")
    by_name = open_folder(tmp_path / "name", "--sites", "A", "B", "--networks", "own", "--matching", "name")
    assert (by_name.networks, by_name.matching) == ("own", "name")
    equal = open_folder(tmp_path / "equal", "--sites", "A", "B", "--networks", "equal")
    assert equal.matching == "resolution" and "networks" not in equal.model_dump(mode="json")
    with pytest.raises(FederationError, match="with --networks equal, not own"):
        open_folder(tmp_path / "equal", "--networks", "own")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--proximal", "0"), "proximal"),
        (("--proximal", "nan"), "proximal"),
        (("--keep-local", "two words"), "keep_local"),
        (("--finetune-epochs", "-1"), "finetune_epochs"),
        (("--epochs", "5", "--finetune-epochs", "6"), "--finetune-epochs 6 is more than the 5 epochs"),
        (("--initial-weights", "missing.pth"), "no initial weights missing.pth"),
        (("--initial-weights", __file__), "is no checkpoint to start from"),
    ],
)
def test_methods_that_make_no_sense_found_no_federation(tmp_path, options, complaint):
    with pytest.raises(FederationError, match=complaint) as refused:
        open_folder(tmp_path / "f", "--sites", "A", "B", *options)
    assert "\n" not in str(refused.value)
    with Store(tmp_path / "f") as store:
        assert store.load_settings() is None


def test_initial_weights_are_copied_and_known_by_their_digest(tmp_path):
    torch = pytest.importorskip("torch")
    for number in (1, 2):
        torch.save({"network_weights": {"w": torch.full((2,), float(number))}}, tmp_path / f"{number}.pth")
    options = ("--initial-weights", str(tmp_path / "1.pth"))
    settings = open_folder(tmp_path / "f", "--sites", "A", "B", *options)
    assert open_folder(tmp_path / "f", *options) == settings
    with pytest.raises(FederationError, match="with --initial-weights"):
        open_folder(tmp_path / "f", "--initial-weights", str(tmp_path / "2.pth"))
    (tmp_path / "1.pth").unlink()
    with Store(tmp_path / "f") as store, open_document(store.given_path(settings.initial_weights)) as weights:
        assert weights.read("w").tolist() == [1, 1]
    backup(tmp_path / "f", tmp_path / "backup.tar")
    restore(tmp_path / "backup.tar", tmp_path / "restored")
    assert list((tmp_path / "restored" / "given").iterdir())


def test_defaults_are_those_of_nnunet(tmp_path):
    settings = open_folder(tmp_path / "f", "--sites", "A", "B")
    assert (settings.num_epochs, settings.quorum) == (1000, None)
    assert (settings.matching, settings.weighting, settings.precision) == ("resolution", "cases", "float32")


def test_a_federation_that_was_founded_before_there_was_a_choice_keeps_matching_by_name(tmp_path):
    created = open_folder(tmp_path / "f", "--sites", "A", "B", "--matching", "name")
    with Store(tmp_path / "f") as store:
        content = created.model_dump(mode="json")
        del content["matching"]  # as in a folder of an early version
        old = FederationSettings.model_validate(content)
        store.save_settings(old, Event(0.0, "settings", "operator", None, {}))
        store.save_meta("first_settings", content)
    assert open_folder(tmp_path / "f").matching == "name"
    assert open_folder(tmp_path / "f", "--sites", "A", "B") == open_folder(tmp_path / "f", "--matching", "name")


def test_geometry_is_a_part_of_what_masks_say(tmp_path):
    sites = ("--sites", "A", "B", "C")
    settings = open_folder(tmp_path / "f", *sites, "--secure", "--geometry", "quantiles")
    assert (settings.secure.k, settings.secure.geometry) == (3, "quantiles")
    assert open_folder(tmp_path / "f", "--secure") == open_folder(tmp_path / "f") == settings
    with pytest.raises(FederationError, match="--secure 3 --geometry quantiles, not 3 --geometry list"):
        open_folder(tmp_path / "f", "--secure", "3", "--geometry", "list")
    assert open_folder(tmp_path / "g", *sites, "--secure").secure.geometry == "list"
    with pytest.raises(FederationError, match="--geometry list needs --secure: in clear, the coordinator sees"):
        open_folder(tmp_path / "h", *sites, "--geometry", "list")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--epochs", "30"], "with --epochs 20, not 30"),
        (["--sites", "A", "B", "C"], "with --sites A B, not A B C"),
        (["--val-iterations", "3"], "with --val-iterations None, not 3"),
        (["--matching", "name"], "with --matching resolution, not name"),
        (["--precision", "float16"], "with --precision float32, not float16"),
    ],
)
def test_settings_that_differ_later_are_refused_with_the_difference(tmp_path, options, complaint):
    open_folder(tmp_path / "f", "--sites", "A", "B", "--epochs", "20")
    with pytest.raises(FederationError, match=complaint):
        open_folder(tmp_path / "f", *options)


def test_a_service_may_repeat_what_it_was_created_with_after_an_operator_has_changed_it(tmp_path, capsys):
    created = ("--sites", "A", "B", "--epochs", "20")
    settings = open_folder(tmp_path / "f", *created)
    with Store(tmp_path / "f") as store:
        store.save_settings(
            settings.model_copy(update={"sites": ("A", "B", "C"), "validate_every": 5}),
            Event(0.0, "settings", "operator", None, {}),
        )
    capsys.readouterr()
    changed = open_folder(tmp_path / "f", *created)
    assert (changed.sites, changed.validate_every) == (("A", "B", "C"), 5)
    assert (
        capsys.readouterr()
        .out.splitlines()[0]
        .endswith("--sites A B is that of the first start and has no effect: an operator has changed it to A B C since")
    )
    assert open_folder(tmp_path / "f", "--sites", "A", "B", "C") == changed
    with pytest.raises(FederationError, match="with --sites A B C, not A C"):
        open_folder(tmp_path / "f", "--sites", "A", "C")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--sites", "A"], "at least two sites"),
        (["--sites", "A", "a"], "upper and lower case"),
        (["--sites", "A", "Operator"], "that of the operator"),
        (["--sites", "A", "A"], "names are repeated"),
        (["--sites", "A", "../B"], "no name for a site"),
        (["--sites", "A", "B.C"], "no name for a site"),
        (["--sites", "A", "B", "--epochs", "0"], "num_epochs"),
        (["--sites", "A", "B", "--quorum", "3", "--deadline", "1"], "--quorum 3 is more than the 2 sites"),
        (["--sites", "A", "B", "--quorum", "1"], "--quorum needs --deadline"),
        (["--sites", "A", "B", "--secure"], "secure aggregation needs 3"),
        (["--sites", "A", "B", "C", "--secure", "2"], "--secure is not valid: k: Input should be greater than"),
        (["--sites", "A", "B", "C", "--secure", "4"], "--secure 4 is more than the 3 sites"),
        (["--sites", "A", "B", "C", "--secure", "--min-sites", "2"], "--min-sites 2 is less than --secure 3"),
        (["--sites", *"ABCDE", "--secure", "--quorum", "3", "--deadline", "1"], "the 4 of 5 sites that it takes"),
        (
            ["--sites", *"ABCDE", "--secure", "--quorum", "4", "--deadline", "1", "--late-updates", "carry"],
            "--late-updates carry does not go with --secure",
        ),
        (["--sites", "A", "B", "--quorum", "1", "--deadline", "9"], "--quorum 1 is less than --min-sites 2"),
        (["--sites", "A", "B", "C", "--quorum", "2", "--deadline", "9", "--min-sites", "3"], "--quorum 2 is less than"),
        (["--sites", "A", "B", "--min-sites", "3"], "--min-sites 3 is more than the 2 sites"),
        (["--sites", "A", "B", "--min-sites", "1"], "min_sites"),
        (["--sites", "A", "B", "--deadline", "60"], "--deadline needs --quorum"),
        (["--sites", "A", "B", "--late-updates", "carry"], "--late-updates carry needs --quorum and --deadline"),
        (["--sites", "A", "B", "--deadline", "-1"], "deadline_s"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, options, complaint):
    with pytest.raises(FederationError, match=complaint):
        open_folder(tmp_path / "f", *options)
    assert open_folder(tmp_path / "f", "--sites", "A", "B").sites == ("A", "B")  # nothing was created


def test_the_names_of_the_sites_are_asked_for_where_somebody_can_answer(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: "north, south west")
    assert open_folder(tmp_path / "asked").sites == ("north", "south", "west")
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    assert open_folder(tmp_path / "default").sites == coordinator.DEFAULT_SITES
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(FederationError, match=f"{tmp_path / 'nobody'} holds no federation yet: name its sites"):
        open_folder(tmp_path / "nobody", "--epochs", "3")
    assert open_folder(tmp_path / "asked").sites == ("north", "south", "west"), "a later start asks nobody"


@pytest.mark.parametrize(
    ("options", "speaks_tls", "url"),
    [
        ({}, False, "http://127.0.0.1:1"),
        ({"host": "::1"}, False, "http://[::1]:1"),
        ({"host": "10.0.0.5"}, True, "https://10.0.0.5:1"),
        ({"host": "10.0.0.5", "insecure": True}, False, "http://10.0.0.5:1"),
        ({"url": "https://hospital.example/fed/"}, False, "https://hospital.example/fed"),  # a proxy with TLS
        ({"tls_certificate": "c.pem", "tls_key": "k.pem"}, True, "https://127.0.0.1:1"),
        ({"host": "0.0.0.0", "url": "https://hospital.example:8750"}, True, "https://hospital.example:8750"),
    ],
)
def test_other_machines_are_served_with_tls(options, speaks_tls, url):
    place = listen_address.ListenAddress(port=1, **options)
    assert (place.speaks_tls, place.public_url) == (speaks_tls, url)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"host": "0.0.0.0"}, "--url"),
        ({"host": "10.0.0.5", "url": "http://hospital.example"}, "plain HTTP, but the coordinator speaks TLS"),
        ({"tls_key": "k.pem"}, "go together"),
        ({"client_authority": "ca.pem"}, "needs TLS"),
    ],
)
def test_addresses_that_make_no_sense_are_refused(options, complaint):
    with pytest.raises(FederationError, match=complaint):
        listen_address.ListenAddress(**options)


def test_a_start_without_options_keeps_the_address(tmp_path):
    arguments = coordinator.build_parser().parse_args(["--host", "10.0.0.5", "--insecure"])
    first = listen_address.settle_address({}, arguments)
    assert (first.host, first.insecure, first.port) == ("10.0.0.5", True, listen_address.DEFAULT_PORT)
    again = listen_address.settle_address(
        {"host": first.host, "insecure": True, "port": 99, "url": None}, coordinator.build_parser().parse_args([])
    )
    assert (again.host, again.insecure, again.port) == ("10.0.0.5", True, 99)


def settled(stored, *options):
    """Return what a start with these options stores."""
    return asdict(listen_address.settle_address(stored, coordinator.build_parser().parse_args(options)))


def test_what_was_said_of_tls_can_be_taken_back(tmp_path):
    files = ("--tls-certificate", "c.pem", "--tls-key", "k.pem", "--client-authority", "ca.pem")
    given = settled({}, "--tls", *files, "--url", "https://hospital.example")
    assert given["tls"] and given["client_authority"] == str(Path("ca.pem").resolve())
    assert settled(given) == given
    assert settled(given, "--client-authority", "none") == {**given, "client_authority": None}
    assert settled(given, "--client-authority", "") == {**given, "client_authority": None}
    no_files = ("--tls-certificate", "none", "--tls-key", "none", "--client-authority", "none")
    assert settled(given, "--no-tls", *no_files, "--url", "none") == settled({}, "--no-tls") == settled({})
    assert settled(given, "--no-tls", *no_files, "--url", "http://localhost:1")["url"] == "http://localhost:1"
    with pytest.raises(FederationError, match="go together, none with none"):
        settled(given, "--tls-certificate", "none")
    with pytest.raises(FederationError, match="--no-tls: the coordinator still speaks TLS, since it has a certificate"):
        settled(given, "--no-tls")
    with pytest.raises(FederationError, match=r"still speaks TLS, since --host 10\.0\.0\.5 is beyond"):
        settled({}, "--no-tls", "--host", "10.0.0.5")


@pytest.mark.parametrize(
    ("options", "is_exposed"),
    [
        ((), True),  # a service that repeats nothing goes on as it was
        (("--host", "10.0.0.5", "--url", "http://hospital.example"), True),  # or all of it
        (("--port", "9000"), True),
        (("--no-insecure", "--url", "https://hospital.example"), False),
        (("--host", "10.0.0.6", "--url", "https://hospital.example"), False),
        (("--host", "10.0.0.6", "--insecure"), True),
        (("--host", "127.0.0.2"), False),
    ],
)
def test_plain_http_is_allowed_for_one_address(options, is_exposed):
    stored = settled({}, "--host", "10.0.0.5", "--url", "http://hospital.example", "--insecure")
    again = listen_address.ListenAddress(**settled(stored, *options))
    assert (again.is_exposed, again.insecure) == (is_exposed, is_exposed)


def test_a_new_address_does_not_inherit_plain_http_silently():
    stored = settled({}, "--host", "10.0.0.5", "--url", "http://hospital.example", "--insecure")
    with pytest.raises(FederationError, match="or --insecure, at every change of the address"):
        settled(stored, "--host", "10.0.0.6")
    here = settled(stored, "--host", "127.0.0.2")
    assert listen_address.ListenAddress(
        **settled(here, "--host", "0.0.0.0", "--url", "https://hospital.example")
    ).speaks_tls


@pytest.mark.slow
def test_a_restart_says_that_connections_are_not_encrypted_and_when_they_are_again(tmp_path):
    everywhere = ("--host", "0.0.0.0", "--insecure", "--url")
    with coordinator_process(tmp_path / "f", "--sites", "A", "B", *everywhere, "http://127.0.0.1:1") as process:
        assert process.stop() == 0
        for times, options, words in (
            (2, (), "connections to 0.0.0.0 are not encrypted (--insecure)"),
            (1, ("--url", "https://127.0.0.1:1"), "the coordinator speaks TLS now: --insecure was given for another"),
            (2, ("--no-insecure",), "connections to 0.0.0.0 are not encrypted (--insecure)"),
        ):
            process.options, process.port = options, 0
            process.start()
            assert process.text().count(words) == times
            assert process.stop() == 0


def start(folder, *options) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; only of a start that fails."""
    code = "from nnunetv2.federated.commands.coordinator import coordinator_entry; coordinator_entry()"
    return subprocess.run(
        [sys.executable, "-c", code, "--folder", str(folder), *options],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        timeout=MUCH_LONGER_S,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_a_start_that_fails_leaves_the_address_as_it_was(tmp_path):
    folder = tmp_path / "federation"
    with coordinator_process(folder, "--sites", "A", "B") as process:
        assert process.stop() == 0
        for options in (("--client-authority", "/nope.pem"), ("--tls-certificate", "/no.pem", "--tls-key", "/no.key")):
            failed = start(folder, "--tls", *options)
            assert failed.returncode == 1 and options[1] in failed.stderr, failed.stderr
        process.start()
        assert process.url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize("port", ["99999", "-1", "eight", "\u0663", "9" * 5000])
def test_what_is_no_port_is_refused(port, capsys):
    with pytest.raises(SystemExit):
        coordinator.build_parser().parse_args(["--port", port])
    assert "expected a number from 0 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["a..b", "\u00e4" * 70])
def test_what_is_no_host_is_refused(host):
    with pytest.raises(FederationError, match="cannot listen on .*--host or --port"):
        listen_address.open_socket(host, 0)


def test_help_answers_at_once_without_torch():
    code = (
        "import sys; from nnunetv2.federated.commands.coordinator import main\n"
        "try:\n    main(['-h'])\nfinally:\n"
        "    late = {'torch', 'requests', 'starlette', 'uvicorn', 'pydantic', 'scipy'} & set(sys.modules)\n"
        "    assert not late, late"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0 and "--deadline S" in done.stdout, done.stderr


@pytest.mark.slow
def test_errors_are_one_line(tmp_path):
    code = "from nnunetv2.federated.commands.coordinator import coordinator_entry; coordinator_entry()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--folder", str(tmp_path / "f"), "--sites", "A"],
        capture_output=True,
        text=True,
        cwd=PROJECT,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "a federation has at least two sites, got A" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
@pytest.mark.parametrize("exists", [False, True])
def test_a_disk_that_takes_nothing_is_one_line_that_names_the_folder(tmp_path, exists):
    import resource

    folder = tmp_path / "f"
    if exists:
        open_folder(folder, "--sites", "A", "B")
    code = "from nnunetv2.federated.commands.coordinator import coordinator_entry; coordinator_entry()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--folder", str(folder), "--port", "0", "--sites", "A", "B"],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        timeout=60,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and f"the folder {folder} cannot be written" in done.stderr
    assert "Restore a backup" not in done.stderr


@pytest.mark.parametrize("what", ["write_state_file", "appoint_operator"])
def test_a_disk_that_is_full_when_the_coordinator_is_up_ends_it_in_order(tmp_path, monkeypatch, capsys, what):
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(coordinator, what, no_room)
    stopped, stop = [], Coordinator.stop
    monkeypatch.setattr(Coordinator, "stop", lambda self: (stopped.append(self), stop(self)))
    folder = tmp_path / "f"
    with pytest.raises(FederationError, match=f"the folder {folder} cannot be written: .*No space left") as refusal:
        coordinator.main(["--folder", str(folder), "--port", "0", "--sites", "A", "B"])
    assert "\n" not in str(refusal.value) and "Traceback" not in "".join(capsys.readouterr())
    assert len(stopped) == 1 and not (folder / "operator.json").exists()


@pytest.fixture
def without_torch(tmp_path, monkeypatch):
    """Let child processes fail to import torch and whatever only training needs."""
    folder = tmp_path / "blocked"
    folder.mkdir()
    for name in ("torch", "scipy", "SimpleITK", "skimage", "nibabel", "blosc2", "batchgenerators", "matplotlib"):
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is blocked')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(PROJECT)]))


@pytest.mark.slow
def test_serves_without_torch_and_stops_cleanly(tmp_path, without_torch):
    folder = tmp_path / "federation"
    with coordinator_process(folder, "--sites", "A", "B") as process:
        invitations = [line.split()[2] for line in process.text().splitlines() if "nnUNetv2_fed_join" in line]
        assert [decode_invitation(word).site for word in invitations] == ["A", "B"]
        assert {decode_invitation(word).url for word in invitations} == {process.url}
        credentials = process.credentials()
        with make_client(credentials["A"]) as a, make_client(credentials["B"]) as b:
            a.contribute(CensusKey(), make_census(1))
            assert b.exchange(CensusKey(), make_census(2)).message.num_cases == 3
        assert process.stop(signal.SIGTERM) == 0
        assert "fingerprint/census is closed: A, B" in process.text()
        assert process.text().rstrip().endswith("the coordinator has stopped")
        assert not (folder / "coordinator.json").exists()
        assert "GET" not in process.text()  # no line per request


@pytest.mark.slow
def test_later_starts_go_on_at_the_same_port_and_invite_who_has_not_joined(tmp_path):
    folder = tmp_path / "federation"
    with coordinator_process(folder, "--sites", "A", "B") as first:
        words = [line.split()[2] for line in first.text().splitlines() if "nnUNetv2_fed_join" in line]
        join(decode_invitation(words[0]), path=tmp_path / "A.json")
        assert first.stop(signal.SIGINT) == 0
        again = CoordinatorProcess(folder, port=first.port)
        try:
            assert again.port == first.port
            wait_until(lambda: again.text().count("is served at") == 2)
            assert again.text().count(words[0]) == 1 and again.text().count(words[1]) == 2
            second = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    "from nnunetv2.federated.commands.coordinator import coordinator_entry as e; e()",
                    "--folder",
                    str(folder),
                ],
                capture_output=True,
                text=True,
                cwd=PROJECT,
            )
            assert second.returncode == 1 and "served by another coordinator" in second.stderr
        finally:
            again.stop()


@pytest.mark.slow
def test_stopping_does_not_wait_for_sites_that_wait(tmp_path):
    with coordinator_process(tmp_path / "federation", "--sites", "A", "B", grace_s=MUCH_LONGER_S) as process:
        credential = process.credentials()["A"]
        errors, lines = [], []

        def wait():
            with make_client(credential, lines, give_up_after_s=0.5) as client:
                try:
                    client.exchange(CensusKey(), make_census())
                except CoordinatorUnreachable as error:
                    errors.append(error)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        wait_until(lambda: any("waiting for B" in line for line in lines))
        assert process.stop() == 0
        thread.join(PATIENCE_S)
        assert errors


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_a_log_that_is_full_or_narrow_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    code = "import sys; from nnunetv2.federated.commands.coordinator import main; sys.exit(main(sys.argv[1:]))"
    folder = tmp_path / "federation"
    with FULL.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "--folder", str(folder), "--port", "0", "--sites", "A", "B"],
            cwd=PROJECT,
            stdout=log,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
    try:
        wait_until(lambda: (folder / "operator.json").exists() or process.poll() is not None)
        operator = operator_credential(folder)
        ask(operator, "POST", "members", None, InviteRequest(name="C"))
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def test_a_federation_that_masks_asks_for_the_library_before_it_is_founded(tmp_path, monkeypatch):
    monkeypatch.setattr("nnunetv2.federated.privacy.cryptography_library.find_spec", lambda name: None)
    with pytest.raises(FederationError, match="pip install cryptography"):
        coordinator.given_settings(coordinator.build_parser().parse_args(["--sites", "A", "B", "C", "--secure"]))


def test_the_number_of_secure_holds_for_all_that_is_pooled(tmp_path):
    given = coordinator.given_settings(coordinator.build_parser().parse_args(["--sites", *"ABCD", "--secure", "4"]))
    settings = coordinator.new_settings(given, tmp_path)
    assert (settings.min_sites, settings.secure.k) == (4, 4)
