"""Check that this site's allow-list permits the documents of planning and training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from nnunetv2.federated.errors import FederationError, NotAllowedError
from nnunetv2.federated.privacy.allow_list import allow_list_path, check_body, check_document, load_allow_list
from nnunetv2.federated.privacy.disclosure import Disclosure
from nnunetv2.federated.protocol.messages import Message
from nnunetv2.site_check.findings import Finding

_finding = partial(Finding, area="permission")


def check_permission(documents: Sequence[Disclosure], *, url: str) -> Finding:
    """Ask the allow-list for each document, as sending it would.

    Args:
        documents: All that planning and training would send.
        url: The coordinator that they are for.
    """
    try:
        if load_allow_list() is None:
            sentence = "This site keeps no allow-list: everything may leave that nnUNetv2_fed_manifest shows."
            return _finding(name="allow_list_absent", state="ok", sentence=sentence)
        for document in documents:
            if isinstance(document.message, Message):
                check_document(document.message, document.specs, url=url)
            else:
                check_body(document.kind, document.message, url=url)
    except NotAllowedError as error:
        return _finding(
            name="allow_list_forbids",
            state="problem",
            sentence=f"The allow-list stops {document.when}: {str(error).partition(' (')[0]}.",
            remedy="If it may leave, read it with nnUNetv2_fed_manifest, and write the list "
            f"{allow_list_path()[0]} anew with --write-allow-list.",
        )
    except FederationError as error:
        return _finding(
            name="allow_list_unreadable",
            state="problem",
            sentence=f"{error}.",
            remedy="Write it anew: nnUNetv2_fed_manifest with --write-allow-list.",
        )
    sentence = f"The allow-list {allow_list_path()[0]} lets all of it out: {len(documents)} kinds of documents."
    return _finding(name="allow_list", state="ok", sentence=sentence)
