"""Optimization on arrays: the knapsack, the surrogate of the loss, Pareto fronts."""
