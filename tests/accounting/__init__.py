"""Tests of lightning_dp.accounting; dp-accounting and brute force are the oracles."""
