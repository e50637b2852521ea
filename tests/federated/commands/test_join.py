"""The command that joins a federation."""

from fake_federation import make_settings, served

from nnunetv2.federated.commands.join import main
from nnunetv2.federated.protocol.invitation import Invitation, encode_invitation
from nnunetv2.federated.site.credential import load_credential


def test_joining_takes_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_fed_site", str(tmp_path / "site.json"))
    with served(tmp_path / "federation", make_settings(sites=("A", "B", "C"))) as federation:
        invitation = Invitation(federation.url, "test", "A", federation.invitations()["A"])
        assert main([encode_invitation(invitation)]) == 0
        line = capsys.readouterr().out
        assert line.count("\n") == 1 and "Site A has joined test" in line and "B, C" in line
        credential = load_credential()
        assert (credential.url, credential.site) == (federation.url, "A")
        assert credential.token.startswith("A.") and len(credential.token) > 40
        assert not (tmp_path / "site.json.joining").exists()
        assert "site A has joined" in federation.lines
