"""Speak HTTP to a coordinator by hand, as a member or as nobody."""

from __future__ import annotations

import hashlib

import requests
from patience import PATIENCE_S

from nnunetv2.federated.protocol.document import TensorSpec, write_document


class Peer:
    """A member, or nobody, that speaks HTTP by hand."""

    def __init__(self, federation, token: str, folder) -> None:
        self.base, self.folder = f"{federation.url}/v1", folder
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {token}"

    def document(self, message, tensors=None) -> bytes:
        tensors = tensors or {}
        path = self.folder / "document.safetensors"
        write_document(path, message, {name: TensorSpec.of(v) for name, v in tensors.items()}, tensors.values())
        return path.read_bytes()

    def put(self, key: str, body: bytes, **headers) -> requests.Response:
        headers = {"X-Content-SHA256": hashlib.sha256(body).hexdigest(), **headers}
        return self.session.put(f"{self.base}/gatherings/{key}", data=body, headers=headers, timeout=PATIENCE_S)

    def get(self, path: str, **options) -> requests.Response:
        return self.session.get(f"{self.base}/{path}", timeout=PATIENCE_S, **options)

    def post(self, path: str, body: object) -> requests.Response:
        return self.session.post(f"{self.base}/{path}", json=body, timeout=PATIENCE_S)

    def offer(self, key: str, digest: str, size: int) -> requests.Response:
        return self.post(f"offers/{key}", {"digest": digest, "size": size})
