"""Tests of the promises; they mirror the source."""
