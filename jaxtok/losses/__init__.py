"""Losses: pure functions `f(outputs, batch) -> scalar`. One idea, one file."""
