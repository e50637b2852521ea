"""Identify the job of a cluster's scheduler."""

from __future__ import annotations

import os


def get_cluster_job_id() -> str | None:
    """Return the number that SLURM or LSF gave this job, None outside a cluster."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("LSB_JOBID")
