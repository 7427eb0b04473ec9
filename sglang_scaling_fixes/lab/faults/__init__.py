"""What breaks a server on purpose: corrupted KV, lost messages, failed
writes, a wait that is left out."""
