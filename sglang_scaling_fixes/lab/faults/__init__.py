"""What breaks a server on purpose: corrupted KV, lost messages, a wait that is left out."""
