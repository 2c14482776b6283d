"""deltaserve: one frozen backbone on the device; every request names its delta."""
