"""What is played on the servers: races of a late write against a new owner, and random load."""
