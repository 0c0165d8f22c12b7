"""The records: what a run writes down while it goes on, and can go on from."""
