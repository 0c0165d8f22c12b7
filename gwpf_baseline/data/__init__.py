"""The data: where it comes from, how it is decoded and divided among clients."""
