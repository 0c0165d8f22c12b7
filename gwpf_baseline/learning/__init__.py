"""What learns: the flat model, the local loop, the client, the server's optimiser."""
