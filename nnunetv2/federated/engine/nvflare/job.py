"""Write the folder of a job, and name the classes that participants have to allow.

Knows file formats of NVFlare 2.9 only: nothing of it has to be installed where a job is written.
"""

from __future__ import annotations

import json
from pathlib import Path

from nnunetv2.federated.engine.plan import CoordinatorTask, SiteTask
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.protocol.api import LEAST_SITES
from nnunetv2.utilities.atomic_write import save_json_atomically

CLASSES = {
    "server": "nnunetv2.federated.engine.nvflare.controller.FederationController",
    "site": "nnunetv2.federated.engine.nvflare.executor.SiteExecutor",
}
"""The one class that each kind of participant lets a job name."""
ALLOW_LIST = "class_allow_list"
APP = "app"
TASK = "federate"
"""Name of the task that the server gives the sites, in the job and at both ends."""
WORKFLOW = "federation"


def write_job(folder: Path, coordinator: CoordinatorTask, site: SiteTask, *, sites: tuple[str, ...] = ()) -> None:
    """Write a job for `nvflare job submit -j FOLDER`.

    Args:
        sites: Those that take part, all of which must be there; none given: all that are connected.

    Raises:
        FederationError: Something is in the way.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FederationError(f"{folder} holds something already: choose another folder for the job")
    config = folder / APP / "config"
    config.mkdir(parents=True, exist_ok=True)
    given = coordinator.model_dump(mode="json", exclude_unset=True)
    workflow = {"id": WORKFLOW, "path": CLASSES["server"], "args": {"task": given}}
    executor = {"path": CLASSES["site"], "args": {"task": site.model_dump(mode="json")}}
    no_filters = {"format_version": 2, "task_data_filters": [], "task_result_filters": [], "components": []}
    save_json_atomically({**no_filters, "workflows": [workflow]}, config / "config_fed_server.json")
    save_json_atomically(
        {**no_filters, "executors": [{"tasks": [TASK], "executor": executor}]}, config / "config_fed_client.json"
    )
    meta = {
        "name": coordinator.federation,
        "resource_spec": {},
        "min_clients": len(sites) or LEAST_SITES,
        "deploy_map": {APP: ["server", *sites] if sites else ["@ALL"]},
        **({"mandatory_clients": list(sites)} if sites else {}),
    }
    save_json_atomically(meta, folder / "meta.json")


def describe_allowing(kind: str) -> str:
    """Return the one line that a participant adds to its list of allowed classes."""
    return f'"{CLASSES[kind]}",'


def is_allowed(kit: Path, kind: str) -> bool:
    """Return whether a participant's own list names the class of its part."""
    local = kit / "local"
    for name in ("resources.json", "resources.json.default"):
        if (local / name).is_file():
            content = json.loads((local / name).read_text(encoding="utf-8"))
            return CLASSES[kind] in content.get(ALLOW_LIST, ())
    return False
