"""The pair at work: lanes, judges, skills, guardrails, traces, review, rounds, serving."""
