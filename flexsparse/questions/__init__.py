"""What is asked of a mask before it runs: check, diff, explain."""
