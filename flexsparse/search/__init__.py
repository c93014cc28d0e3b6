"""Search: from a text, a pattern for each head under a budget of blocks."""

from flexsparse.search.candidates import candidates_for
from flexsparse.search.knapsack import Assignment, assign
from flexsparse.search.search import CRITERIA, Found, search

__all__ = ["CRITERIA", "Assignment", "Found", "assign", "candidates_for", "search"]
