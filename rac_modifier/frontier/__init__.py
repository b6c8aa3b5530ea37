"""Recipes compared: a grid of them run and measured into a folder, and its page."""
