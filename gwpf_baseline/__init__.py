"""Communication-efficient federated learning on Flower: GWPF and its comparators."""
