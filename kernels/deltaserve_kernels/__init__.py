"""Every row its own delta: the operations that apply them, and the tables they read. torch (and Triton) only."""
