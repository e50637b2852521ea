"""Do a site's part of a federation inside its job of NVIDIA FLARE."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from nnunetv2.federated.engine.commands import LOCK_FILE, AbortedError, environment_of, run_command
from nnunetv2.federated.engine.gateway import Gateway
from nnunetv2.federated.engine.nvflare.cells import CellChannel, check_is_safe
from nnunetv2.federated.engine.nvflare.job import TASK
from nnunetv2.federated.engine.plan import SITE_FILE, SiteTask, check_allowed, commands_of, parse_task, read_site_file
from nnunetv2.federated.errors import FederationError
from nnunetv2.utilities.command_line import find_command

CREDENTIAL_FILE = "federated_site.json"
PAUSE_S = 1.0
ATTACHED_S = 30.0
"""How often an attached gateway looks whether the training is over."""
QUIET_S = 600.0
"""How long an attached gateway stays when the training is over and nobody asks anything."""
START_PATIENCE_S = 300.0
"""How long the server's job may take to answer the first question."""


class SiteExecutor(Executor):  # type: ignore[misc] # has no types
    """Open the gateway of this site, then run the commands that its file allows.

    Args:
        task: See `SiteTask`.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__()
        self._task: SiteTask = parse_task(SiteTask, task)

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Do this site's part of the job, and tell how it has ended."""

        def is_aborted() -> bool:
            return bool(abort_signal.triggered)

        try:
            if task_name != TASK:
                return make_reply(ReturnCode.TASK_UNKNOWN)
            self._federate(fl_ctx, is_aborted)
        except AbortedError:
            return make_reply(ReturnCode.TASK_ABORTED)
        except (FederationError, OSError) as error:
            self.log_error(fl_ctx, str(error), fire_event=False)
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        return make_reply(ReturnCode.OK)

    def _federate(self, fl_ctx: FLContext, is_aborted: Callable[[], bool]) -> None:
        engine, name, job = fl_ctx.get_engine(), str(fl_ctx.get_identity_name()), str(fl_ctx.get_job_id())
        workspace = engine.get_workspace()
        local = Path(workspace.get_site_config_dir())
        site = read_site_file(local)
        check_allowed(self._task, site, local / SITE_FILE)
        commands = [
            [find_command(program, site.commands_folder), *rest]
            for program, *rest in ([] if site.attach else commands_of(self._task, site))
        ]
        cell = engine.get_cell()
        check_is_safe(cell, is_secure=bool(fl_ctx.get_prop(FLContextKey.SECURE_MODE, False)))
        folder = Path(site.folder) / self._task.federation
        credential = folder / CREDENTIAL_FILE
        channel = CellChannel(cell, job)
        gateway = Gateway(
            channel,
            site=name,
            through=f"nvflare:{project_of(workspace)}/{self._task.federation}",
            credential=credential,
            folder=folder / "under_way",
        )
        channel.on_change(gateway.notify)
        try:
            _start(gateway, is_aborted)
            self.log_info(fl_ctx, f"the gateway of {name} is open; credential {credential}", fire_event=False)
            for command in commands:
                run_command(
                    command,
                    environment=environment_of(site.environment, credential),
                    lock=folder / LOCK_FILE,
                    log=folder / "logs" / f"{Path(command[0]).name}.log",
                    is_aborted=is_aborted,
                )
            if site.attach:
                _stay_open(gateway, self._task, is_aborted)
        finally:
            gateway.stop()


def project_of(workspace: Any) -> str:
    """Return the name of the NVFlare project, from the startup kit."""
    content = json.loads(Path(workspace.get_client_startup_file_path()).read_text(encoding="utf-8"))
    return str(content["servers"][0]["name"])


def _start(gateway: Gateway, is_aborted: Callable[[], bool]) -> None:
    """Open the gateway once the server's job answers."""
    deadline = time.monotonic() + START_PATIENCE_S
    while True:
        try:
            gateway.start()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        _pause(PAUSE_S, is_aborted)


def _stay_open(gateway: Gateway, task: SiteTask, is_aborted: Callable[[], bool]) -> None:
    """Keep the gateway open for people's commands, until the training is over and nobody has asked for a while."""
    run = f"{task.configuration}.fold_{task.fold}.{task.trainer}"
    while True:
        _pause(ATTACHED_S, is_aborted)
        if time.monotonic() - gateway.remote.last_asked > QUIET_S and _is_over(gateway, run):
            return


def _is_over(gateway: Gateway, run: str) -> bool:
    try:
        return gateway.remote.run_state(run).closed
    except (FederationError, OSError):
        return False


def _pause(seconds: float, is_aborted: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_aborted():
            raise AbortedError
        time.sleep(min(0.2, seconds))
