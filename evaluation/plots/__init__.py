"""Plots of evaluations and trainings, drawn by matplotlib as PNG images or inline SVG."""
