"""Run the coordinator of a federation inside the server's job of NVIDIA FLARE."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from nnunetv2.federated.coordinator.founding import check_membership, settle
from nnunetv2.federated.coordinator.malloc import return_what_is_freed
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.engine.nvflare.cells import CellServer, check_is_safe, sites_of
from nnunetv2.federated.engine.nvflare.job import TASK
from nnunetv2.federated.engine.operators import OperatorServer
from nnunetv2.federated.engine.plan import (
    CoordinatorTask,
    check_given,
    given_of_task,
    parse_task,
    read_server_file,
    settings_of_task,
)
from nnunetv2.federated.engine.responder import Responder
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.protocol.invitation import check_site_name

NVFLARE = "nvflare"
"""Who admits sites, in the audit log."""


class FederationController(Controller):  # type: ignore[misc] # has no types
    """Serve a federation for as long as its sites are at work.

    The federation lies in the folder that the server's own file names: a job that is submitted again goes on with it.

    Args:
        task: See `CoordinatorTask`.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__()
        self._task: CoordinatorTask = parse_task(CoordinatorTask, task)
        check_given(self._task)
        self._open = ExitStack()
        self._sites: dict[str, str] = {}
        self._failed: dict[str, str] = {}
        """Site -> how its part of the job has ended, if not well."""

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Open or found the federation, and begin to answer its sites."""
        try:
            self._start(fl_ctx)
        except (FederationError, OSError) as error:
            self._open.close()
            self._sites = {}
            self.log_error(fl_ctx, str(error))
            self.system_panic(str(error), fl_ctx)

    def _start(self, fl_ctx: FLContext) -> None:
        return_what_is_freed()
        cell, job = self._engine.get_cell(), str(fl_ctx.get_job_id())
        check_is_safe(cell, is_secure=bool(fl_ctx.get_prop(FLContextKey.SECURE_MODE, False)))
        sites = sites_of(self._engine.get_clients())
        for name in sites.values():
            check_site_name(name)
        names = tuple(sorted(sites.values()))

        def log(line: str) -> None:
            self.log_info(fl_ctx, line, fire_event=False)

        local = read_server_file(Path(self._engine.get_workspace().get_site_config_dir()))
        store = self._open.enter_context(Store(Path(local.folder) / self._task.federation))
        check_membership(store, "engine")
        settle(
            store,
            given_of_task(self._task),
            found=lambda given: settings_of_task(self._task, names),
            membership="engine",
            log=log,
        )
        coordinator = Coordinator(store, log=log)
        coordinator.admit(names, by=NVFLARE)
        responder = Responder(coordinator)
        server = CellServer(cell, job, sites, responder.answer, warn=lambda line: self.log_warning(fl_ctx, line))
        if local.port is None:
            coordinator.start()
            self._open.callback(coordinator.stop)
        else:
            operators = OperatorServer(coordinator, local.port)
            operators.start()
            self._open.callback(operators.stop)
            log(f"operators: nnUNetv2_fed_admin --folder {store.folder}; page: {operators.url}")
        self._open.callback(responder.close)
        self._open.callback(server.close)
        coordinator.notifier.subscribe(server.push)
        server.start()
        self._sites = sites
        log(f"{coordinator.settings.federation} with {', '.join(names)} is open; folder {store.folder}")

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Let every site do its part; that is over when all have."""
        if not self._sites:  # the reason was told
            return
        names = sorted(self._sites.values())
        task = Task(name=TASK, data=Shareable(), timeout=0, result_received_cb=self._note_result)
        begun = time.time()
        self.broadcast_and_wait(
            task=task, targets=names, min_responses=len(names), fl_ctx=fl_ctx, abort_signal=abort_signal
        )
        if abort_signal.triggered:
            return
        heard = {one.client.name for one in task.client_tasks if one.result_received_time}
        for name in names:
            if name not in heard:
                self._failed.setdefault(name, "its job has gone away")
        if self._failed:
            lines = "; ".join(f"{site}: {how}" for site, how in sorted(self._failed.items()))
            self.system_panic(f"not all sites have come to the end: {lines}", fl_ctx)
        else:
            self.log_info(fl_ctx, f"all sites are done after {time.time() - begun:.0f} s")

    def _note_result(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        code = client_task.result.get_return_code() if client_task.result is not None else ReturnCode.EMPTY_RESULT
        if code != ReturnCode.OK:
            self._failed[client_task.client.name] = f"ended with {code}; its own log says why"

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Finish documents and exchanges under way, and close the federation's folder."""
        self._open.close()

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """Do nothing: results that come late tell nothing new."""
