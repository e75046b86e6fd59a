"""Models that the expert capsules are compared with."""
