"""The attacks: every case of attacks.json against a live service. `make attack` runs them."""
