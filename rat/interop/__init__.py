"""Bridges to the formats of others."""
