"""What a delta is, on the host: primitives at sites, validated against a backbone."""
