"""Jobs over a backend of which parts are killed, stopped, cut off and slow, checked from outside.

plan.py      what is to happen, drawn from a seed: jobs, and faults beside them
worlds.py    a class for each backend: its parts, its calls, what runs there
driver.py    carries a plan out and notes every answer of pman's
checks.py    what must be true of the answers, of the store and of the backend

`python -m tests.chaos BACKEND` is what `scripts/chaos` runs.
"""
