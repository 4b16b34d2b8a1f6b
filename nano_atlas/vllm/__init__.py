"""Rollouts through vLLM servers: starting them, sampling on them, and getting new weights to them."""
