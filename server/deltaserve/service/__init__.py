"""The only room that speaks gRPC: messages in, engine's requests out, and back."""
