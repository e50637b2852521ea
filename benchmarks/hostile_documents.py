"""Send a coordinator documents whose JSON is meant to hurt it, and measure the damage to it and to others.

    python -m benchmarks.hostile_documents [--mib 30]

Each shape of JSON is sent in each kind of message, once with so many MiB, and once as large as that kind may be (for
a summary of cases: the kind that may be largest, of a site that says that it has 100,000). While
a document is on its way, another site asks for the settings again and again. A line tells the answer, the seconds
until it was there, the coordinator's peak of memory over that before, and the other site's longest wait.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from nnunetv2.federated.exchanges.document_limits import PLANS, REGISTRATION, SMALL, coarse_limits, weights_limits
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.document import TensorSpec, encode_header
from nnunetv2.federated.protocol.invitation import decode_invitation
from nnunetv2.federated.protocol.keys import CensusKey, CoarseKey, InitialKey, PlansKey, RegistrationKey, RoundKey
from nnunetv2.federated.site.credential import load_credential
from nnunetv2.federated.site.enrolment import join

RUN = "3d_fullres.fold_0.nnUNetTrainer"


def _list(item: str, size: int) -> str:
    """Return a list of equal items with about so many characters."""
    return "[" + ",".join([item] * (size // (len(item) + 1))) + "]"


SHAPES: dict[str, Callable[[int], str]] = {
    "empty lists": lambda size: _list("[]", size),
    "small objects": lambda size: _list('{"":0}', size // 2),  # a quotation mark takes two characters in the end
    "numbers": lambda size: _list("-1", size),
    "many keys": lambda size: "{" + ",".join(f'"{number:08x}":0' for number in range(size // 15)) + "}",
    "a long text": lambda size: '"' + "a" * size + '"',
    "a long text, one wide": lambda size: '"' + "a" * (size - 4) + "\U0001f600" + '"',
    "escapes": lambda size: '"' + r"\\u00e9" * (size // 7) + '"',
    "hidden brackets": lambda size: _list(r"\u005b\u005d", size),
    "nested lists": lambda size: "[" * (size // 2) + "]" * (size // 2),
    "nested objects": lambda size: '{"":' * (size // 7) + "0" + "}" * (size // 7),
    "a long integer": lambda size: "1" * size,
    "a long fraction": lambda size: "0." + "1" * size,
    "blanks": lambda size: " " * size + "0",
}
MESSAGES = {
    "plans": (PlansKey("p"), '"kind":"plans_report","plans":{"x":%s}'),
    "census": (CensusKey(), '"kind":"census","num_cases":3,"channel_names":{"0":"CT"},"labels":%s'),
    "registration": (
        RegistrationKey(RUN),
        '"kind":"registration","configuration":"3d_fullres","fold":"0","trainer":"nnUNetTrainer",'
        '"num_training_cases":3,"plans":{},"dataset_json":{"channel_names":{"0":"CT"},"labels":{"a":1},'
        '"file_ending":".nii.gz"},"requires_equal_plans":false,"tensors":%s',
    ),
    "coarse": (
        CoarseKey(),
        '"kind":"coarse_summary","spacings":%s,"shapes":[[1,1,1]],"relative_sizes":[1],'
        '"moments":[{"count":1,"mean":1,"m2":1}],"promotes_to_float64":false',
    ),
    "update": (RoundKey(RUN, 0), '"kind":"update","metrics":{"x":%s}'),
}
CASES = 100_000
TENSORS = {"w": TensorSpec("F32", (2,))}
LIMITS = {
    "plans": PLANS.header_bytes,
    "census": SMALL.header_bytes,
    "registration": REGISTRATION.header_bytes,
    "coarse": coarse_limits(CASES, 1, tensor_bytes=0).header_bytes,
    "update": weights_limits(TENSORS).header_bytes,
}
"""Kind -> bytes of the largest header."""


@dataclass(frozen=True)
class Damage:
    """The costs of a document."""

    answer: str
    seconds: float
    peak_mib: float
    others_wait_s: float


def document(message: str) -> bytes:
    """Return the bytes of a document with a message.

    The message's quotation marks are escaped as JSON wants it; "hidden brackets" come with escapes of their own.
    """
    text = f'{{"protocol":1,{message}}}'.replace('"', '\\"')
    header = f'{{"__metadata__":{{"message":"{text}"}}}}'.encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def send(url: str, token: str, key: str, body: bytes) -> str:
    """Send a document and return the beginning of the answer."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=300)
    try:
        with suppress(BrokenPipeError, ConnectionResetError):  # it may be refused before it is there
            connection.request(
                "PUT",
                f"/v1/gatherings/{key}",
                body,
                {"Authorization": f"Bearer {token}", "X-Content-SHA256": hashlib.sha256(body).hexdigest()},
            )
        answer = connection.getresponse()
        content = answer.read()
        return f"{answer.status} {json.loads(content).get('message', '')}"
    finally:
        connection.close()


@contextmanager
def asking(url: str, token: str) -> Iterator[list[float]]:
    """Let another site ask again and again, and yield the seconds that its answers take."""
    waits, stop = [0.0], threading.Event()
    request = urllib.request.Request(f"{url}/v1/settings", headers={"Authorization": f"Bearer {token}"})

    def ask() -> None:
        while not stop.wait(0.02):
            begin = time.monotonic()
            urllib.request.urlopen(request, timeout=300).read()
            waits.append(time.monotonic() - begin)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield waits
    finally:
        stop.set()
        thread.join()


def go_on(url: str, tokens: dict[str, str]) -> None:
    """Let both sites send the documents that must precede summaries and updates."""
    for site, token in tokens.items():
        census = messages.Census(num_cases=CASES if site == "M" else 3, channel_names={"0": "CT"}, labels={"a": 1})
        registration = messages.Registration(
            configuration="3d_fullres",
            fold="0",
            trainer="nnUNetTrainer",
            num_training_cases=3,
            plans={"plans_name": "p"},
            requires_equal_plans=False,
            dataset_json=messages.TrainingData(channel_names={"0": "CT"}, labels={"a": 1}, file_ending=".nii.gz"),
            tensors=(messages.TensorEntry(name="w", dtype="F32", shape=(2,)),),
        )
        for key, message in ((CensusKey(), census), (RegistrationKey(RUN), registration)):
            send(url, token, key, encode_header(message, {}))
    for site, token in tokens.items():  # the tensor of both is everybody's from the site that comes first
        update = (
            encode_header(messages.Update(), TENSORS) + bytes(8)
            if site == "A"
            else encode_header(messages.Update(), {})
        )
        while not (answer := send(url, token, InitialKey(RUN), update)).startswith("200"):
            if not answer.startswith("409"):
                raise RuntimeError(answer)
            time.sleep(0.1)  # the registration is not closed yet
    time.sleep(1)


def memory(pid: int, field: str) -> float:
    """Return VmRSS or VmHWM of a process in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def measure(pid: int, url: str, tokens: dict[str, str], key: str, body: bytes) -> Damage:
    """Send one document, and measure its costs."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    before = memory(pid, "VmRSS")
    with asking(url, tokens["A"]) as waits:
        begin = time.monotonic()
        answer = send(url, tokens["M"], key, body)
        seconds = time.monotonic() - begin
        time.sleep(0.1)
    return Damage(answer, seconds, memory(pid, "VmHWM") - before, max(waits))


@contextmanager
def coordinator(folder: Path) -> Iterator[tuple[int, str, dict[str, str]]]:
    """Serve a federation of the sites A and M; yield the process's number, the address and the tokens."""
    log = folder.parent / "log"
    code = "import sys; from nnunetv2.federated.commands.coordinator import main; sys.exit(main(sys.argv[1:]))"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "--folder", folder, "--port", "0", "--sites", "A", "M"],
            stdout=output,
            stderr=output,
        )
    try:
        while not (folder / "operator.json").exists():
            if process.poll() is not None:
                raise RuntimeError(log.read_text(encoding="utf-8"))
            time.sleep(0.05)
        url = json.loads((folder / "operator.json").read_text(encoding="utf-8"))["url"]
        tokens = {}
        for line in log.read_text(encoding="utf-8").splitlines():
            if "nnUNetv2_fed_join" in line:
                invitation = decode_invitation(line.split()[2])
                join(invitation, path=folder.parent / f"{invitation.site}.json")
                tokens[invitation.site] = load_credential(folder.parent / f"{invitation.site}.json").token
        yield process.pid, url, tokens
    finally:
        process.terminate()
        process.wait(60)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line per document, and the worst of each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=30.0)
    arguments = parser.parse_args(argv)
    found = []
    with tempfile.TemporaryDirectory() as work, coordinator(Path(work) / "federation") as (pid, url, tokens):
        print(f"at rest: {memory(pid, 'VmRSS'):.0f} MiB")
        for kind, (key, text) in MESSAGES.items():
            if kind == "coarse":
                go_on(url, tokens)
            for size in (int(arguments.mib * 2**20), LIMITS[kind] - 4096):
                for name, shape in SHAPES.items():
                    body = document(text % shape(size))
                    one = measure(pid, url, tokens, key, body)
                    found.append(one)
                    print(
                        f"{kind:12} {name:22} {len(body) / 2**20:5.1f} MiB: {one.seconds:5.2f} s, peak "
                        f"{one.peak_mib:6.1f} MiB, others wait {one.others_wait_s:5.2f} s; {one.answer[:90]}",
                        flush=True,
                    )
        print(
            f"at most {max(one.seconds for one in found):.2f} s, {max(one.peak_mib for one in found):.1f} MiB, "
            f"others {max(one.others_wait_s for one in found):.2f} s; afterwards {memory(pid, 'VmRSS'):.0f} MiB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
