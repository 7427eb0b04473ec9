"""What the project's fixes cost, measured against stock in the same run."""
