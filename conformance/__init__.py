"""Conformance: checks other implementations against the specification."""
