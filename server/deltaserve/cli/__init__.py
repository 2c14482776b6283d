"""The command line. It reaches servers through the client alone, and imports nothing heavy before a command runs."""
