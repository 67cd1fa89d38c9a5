"""The register of rules and its table."""
