"""Tests wait for events: a machine may be busy, and nobody knows for how long."""

import time

LAST_RESORT = 3600  # seconds after which whatever is waited for is taken to have failed


def wait_for(condition, exit_code=lambda: None):
    """Returns when `condition()` holds.

    exit_code: of the process that brings it about, None while that goes on; fails where it ends without the event.
    """
    until = time.monotonic() + LAST_RESORT
    while not condition():
        ended = exit_code()
        assert ended is None or condition(), f"the process has ended with {ended}"
        assert time.monotonic() < until
        time.sleep(0.01)
