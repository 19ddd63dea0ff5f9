"""Egress: what a session's code may reach. The agent moves bytes; here they are parsed, judged and relayed."""
