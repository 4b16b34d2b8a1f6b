"""Rollouts with vLLM: starting servers, sampling, weight sync."""
