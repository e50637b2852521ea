"""How long tests wait for what must happen."""

PATIENCE_S = 240.0
"""Seconds. No machine that works takes so long for any single step, however busy it is; what hangs does."""
MUCH_LONGER_S = 100 * PATIENCE_S
"""Seconds that something would take if what ends it sooner were broken."""
