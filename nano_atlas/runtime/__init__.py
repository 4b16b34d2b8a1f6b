"""The runtime: lanes, judges, skills, guardrails, traces, review, rounds, serving."""
