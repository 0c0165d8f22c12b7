"""Mechanisms that methods are made of, each with a room of its own."""
