"""Batches: many conversions unattended, on one machine or on a Ray cluster, and one report of them."""
