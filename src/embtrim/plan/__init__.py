"""Budgets and size plans: what survives of every table, how many bytes it takes, what a budget allows."""
