"""Verifiable rewards: what a response is worth, decided in worker processes that can be killed."""
