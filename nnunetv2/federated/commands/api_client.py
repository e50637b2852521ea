"""Send single requests to a coordinator, with the standard library and pydantic alone.

So do the commands that also run on the coordinator's machine, where `requests` is not installed.
"""

from __future__ import annotations

import argparse
import http.client
import os
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, overload

from nnunetv2.federated.errors import CoordinatorUnreachable, FederationError, NotJoinedError, RefusedError
from nnunetv2.federated.protocol.certificates import load_chain
from nnunetv2.federated.site.authority import explain_untrusted
from nnunetv2.federated.site.credential import OPERATOR_FILE, SiteCredential, load_credential
from nnunetv2.federated.site.transports.opener import open_url

if TYPE_CHECKING:
    from pydantic import BaseModel

    Model = TypeVar("Model", bound=BaseModel)

DEFAULT_FOLDER = Path("nnUNet_federation")
TIMEOUT_S = 60.0
LARGEST_ANSWER = 32 << 20


def operator_credential(folder: Path | None) -> SiteCredential:
    """Return the credential of the operator on this machine.

    Raises:
        NotJoinedError: The folder is served by no coordinator now, or this machine has no credential.
    """
    if folder is None and not DEFAULT_FOLDER.is_dir():
        return load_credential()
    path = (folder or DEFAULT_FOLDER) / OPERATOR_FILE
    if not path.exists():
        raise NotJoinedError(
            f"no coordinator serves {path.parent} at the moment: start nnUNetv2_fed_coordinator "
            f"--folder {path.parent}, or name another --folder"
        )
    return load_credential(path)


def add_folder_option(parser: argparse.ArgumentParser) -> None:
    """Add `--folder` to a parser; `operator_credential` takes its value."""
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="F",
        help="folder of the federation, on the coordinator's "
        f"machine (default: ./{DEFAULT_FOLDER} if it is there, else the credential of this machine)",
    )


@overload
def ask(
    credential: SiteCredential, method: str, path: str, model: None = None, body: BaseModel | None = None
) -> None: ...


@overload
def ask(
    credential: SiteCredential, method: str, path: str, model: type[Model], body: BaseModel | None = None
) -> Model: ...


def ask(
    credential: SiteCredential, method: str, path: str, model: type[Model] | None = None, body: BaseModel | None = None
) -> Model | None:
    """Send one request to a coordinator and return its answer.

    Raises:
        RefusedError: The coordinator says no.
        CoordinatorUnreachable: Nobody answers.
        FederationError: A certificate of this machine cannot be used.
    """
    from nnunetv2.federated.site.transports.answers import ForeignAnswerError, decode_answer, describe_foreign

    # Fields that were not given on the command line are not sent: they stay as they are.
    data = None if body is None else body.model_dump_json(exclude_unset=True).encode()
    request = urllib.request.Request(
        f"{credential.url}/v1/{path}",
        method=method,
        data=data,
        headers={"Authorization": f"Bearer {credential.token}", "Content-Type": "application/json"},
    )
    context = trusted_by(credential)
    try:
        try:
            with open_url(request, context=context, timeout_s=TIMEOUT_S) as answer:
                content = answer.read(LARGEST_ANSWER)
            return decode_answer(model, content, answer.headers) if model is not None else None
        except ForeignAnswerError as error:
            raise FederationError(
                describe_foreign(request.full_url, answer.status, answer.reason, answer.headers)
            ) from error
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise explain_untrusted(reason, credential.url) from error
        raise CoordinatorUnreachable(
            f"the coordinator at {credential.url} does not answer: {reason!s:.200}. Is it running?"
        ) from error


def trusted_by(credential: SiteCredential) -> ssl.SSLContext:
    """Return a TLS context with the authorities that a credential trusts.

    Those are its own, else REQUESTS_CA_BUNDLE, else the system's. As with `requests`, REQUESTS_CA_BUNDLE names a file
    or a folder.

    Raises:
        FederationError: The authorities, or the certificate that is to be shown, cannot be used.
    """
    given = os.environ.get("REQUESTS_CA_BUNDLE")
    authorities = credential.authority or given or None
    try:
        if authorities is not None and Path(authorities).is_dir():
            context = ssl.create_default_context(capath=authorities)
        else:
            context = ssl.create_default_context(cafile=authorities)
    except OSError as error:  # which ssl.SSLError is
        source = "the coordinator's authority" if credential.authority else "REQUESTS_CA_BUNDLE"
        raise FederationError(
            f"{source}, {authorities}, cannot be used: {error}. Expected a file of certificates in PEM format"
            + ("" if credential.authority else ", or a folder of them that openssl rehash has named")
        ) from error
    if credential.client_certificate is not None:
        load_chain(context, credential.client_certificate, credential.client_key)
    return context


def _refusal(error: urllib.error.HTTPError) -> FederationError:
    from nnunetv2.federated.site.transports.answers import describe_foreign, find_problem

    problem = find_problem(error.read(LARGEST_ANSWER), error.headers)
    if problem is None:
        return FederationError(describe_foreign(error.url, error.code, error.reason, error.headers))
    return RefusedError(problem.message, problem.remedy, code=problem.code)
