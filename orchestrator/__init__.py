"""Sandbox orchestrator: untrusted code in warm containers, each execution in a fresh bubblewrap sandbox."""

__version__ = "0.1.0"
