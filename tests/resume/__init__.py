"""Runs that are interrupted and go on, and runs that are made twice."""
