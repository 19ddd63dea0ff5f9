"""The doors: one module for each way in."""
