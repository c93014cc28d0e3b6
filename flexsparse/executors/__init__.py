"""What runs a launch. Every executor has the signature of `reference`, which defines the result."""
