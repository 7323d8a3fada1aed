"""The decode loop: `round.py` is the algorithm, the other files hold its state and drive it."""
