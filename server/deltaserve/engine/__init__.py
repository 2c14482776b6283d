"""One thread, the only one that touches the device."""
