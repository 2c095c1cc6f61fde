"""Everything that the entropy-model families share. See docs/architecture.md for the rooms."""
