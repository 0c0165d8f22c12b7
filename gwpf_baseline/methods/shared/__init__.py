"""What methods share: measures of significance, stability, sparse uploads."""
