"""The size of a payload against the entropy of what it carries.

A client of GWPF as published uploads the values of the active coordinates, 32 bits
each, and a vote on each frozen one, whose entropy is that of a coin that falls on its
side as often.
"""

import numpy as np
from _common import parser, show

from gwpf_baseline.exchange.header import Header, Kind
from gwpf_baseline.exchange.messages import size_of
from gwpf_baseline.exchange.payload import Writer, to_parameters

DIMENSIONS = (61_706, 11_200_000)  # LeNet-5 and ResNet-18
DENSITIES = (0.001, 0.01, 0.02, 0.1, 0.5)  # of active coordinates, and of votes


def main() -> None:
    """Measure every payload and print the table."""
    options = parser(__doc__, seed=0).parse_args()
    rng = np.random.default_rng(options.seed)
    rows = []
    for dimension in DIMENSIONS:
        for density in DENSITIES:
            active = round(density * dimension)
            votes = rng.random(dimension - active) < density
            header = Header("gwpf_paper", Kind.UPDATE, 2, 1, dimension)
            writer = Writer(header)
            writer.bitmap(votes)
            writer.vector(rng.standard_normal(active, np.float32))
            size = size_of(to_parameters(writer.payload()))
            bits = 32 * active + votes.size * binary_entropy(votes.mean())
            ratio = 8 * size / bits
            rows.append(
                (f"{dimension:,}", density, f"{size:,}", f"{ratio:.4f}", "1.02")
            )
    columns = ("parameters", "density", "bytes", "bytes / entropy", "goal <=")
    show("One upload", columns, rows, options)


def binary_entropy(share: float) -> float:
    """Return the entropy of a bit that is 1 with this probability, in bits."""
    shares = np.array([share, 1 - share])
    return float(-np.sum(shares * np.log2(shares)))


if __name__ == "__main__":
    main()
