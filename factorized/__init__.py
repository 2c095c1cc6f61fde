"""The factorized-prior family (Ballé, Laparra, Simoncelli, 2017)."""
