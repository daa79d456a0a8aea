"""Adapters made of other adapters."""
