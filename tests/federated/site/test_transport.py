"""The transport is chosen by the scheme of the coordinator's address."""

import pytest

from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.site.credential import SiteCredential
from nnunetv2.federated.site.transport import open_transport
from nnunetv2.federated.site.transports.http import HttpTransport


@pytest.mark.parametrize("url", ["http://127.0.0.1:8750", "https://c.example:8750"])
def test_http_is_a_transport(url):
    with open_transport(SiteCredential(url, "test", "A", "A.x"), print) as transport:
        assert isinstance(transport, HttpTransport)


@pytest.mark.parametrize("url", ["grpc://c.example:8002", "c.example", ""])
def test_an_address_without_a_transport_is_named(url):
    with pytest.raises(FederationError, match=f"'{url}' cannot be reached.*http:// or https://.*--replace"):
        open_transport(SiteCredential(url, "test", "A", "A.x"), print)
