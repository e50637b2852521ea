"""The time that tests wait for an event that must happen."""

PATIENCE_S = 240.0
"""Seconds. No machine that works takes so long for any single step, however busy it is; a hanging step does."""
MUCH_LONGER_S = 100 * PATIENCE_S
"""Seconds that a wait would take if its early end were broken."""
