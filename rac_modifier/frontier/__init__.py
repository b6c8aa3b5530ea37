"""Recipes side by side: a grid of them run and measured into a folder, and the page that shows it."""
