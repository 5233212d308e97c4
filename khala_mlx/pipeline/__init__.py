"""Khala: the stages in order."""
