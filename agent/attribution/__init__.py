"""Find the sender of a reply: process, container, pod. Each module has one lookup and one bounded cache.

A lookup that finds nothing returns an empty value and raises no error.
"""
