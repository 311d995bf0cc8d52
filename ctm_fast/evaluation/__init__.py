"""How good samples are: statistics, and features to take them of."""
