"""Package deltaserve.v1 of the wire contract."""
